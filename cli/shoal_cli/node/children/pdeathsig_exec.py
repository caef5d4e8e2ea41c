"""Starts a child: asks the kernel for a signal when the supervisor dies, then becomes the program.

Run as a file (`python -I -S pdeathsig_exec.py <supervisor's pid> <program> …`), so that only the standard library is
loaded and it costs milliseconds. On Linux a child then gets SIGTERM when its supervisor dies, kill -9 included;
elsewhere that cannot be asked for, and the next `shoal up` or `shoal down` ends what was left (orphans.py).
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_CANNOT_START = 127


def main(arguments: list[str]) -> int:
    """Become the program; returns only on failure."""
    supervisor, program = int(arguments[0]), arguments[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != supervisor:
        return 0  # it died before prctl
    try:
        os.execvp(program[0], program)
    except OSError as e:
        print(f"cannot start {program[0]}: {e.strerror}", file=sys.stderr)
    return _CANNOT_START


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
