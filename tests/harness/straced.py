"""Run a function under strace, in a forked process of its own: strace attaches before it begins."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from tests.harness.forked import fork

DEADLINE_S = 60.0


class Ended(msgspec.Struct, frozen=True):
    """How a traced process ended: its exit code (negative: a signal's number), output, and errors."""

    returncode: int
    stdout: str
    stderr: str


def straced(options: tuple[str, ...], directory: Path, life: Callable[..., None], *arguments: object) -> Ended:
    """Run `life(*arguments)` under strace with these options; its output goes to files in `directory`.

    `life` must be a module's function. Safe to call from several threads.
    """
    output, errors = directory / "stdout", directory / "stderr"
    parent_end, child_end = Pipe()
    process = fork(_live, child_end, str(output), str(errors), life, arguments)
    child_end.close()
    try:
        assert parent_end.poll(DEADLINE_S), "the process did not start"
        parent_end.recv()
        with _attached(process.pid, options):
            parent_end.send("begin")
            process.join(DEADLINE_S)
            exit_code = process.exitcode
            process.kill()  # strace ends with it
    finally:
        process.kill()
        process.join()
        parent_end.close()
    assert exit_code is not None, f"{life.__module__} did not end within {DEADLINE_S:g} s"
    return Ended(exit_code, output.read_text(), errors.read_text())


def _attached(pid: int, options: tuple[str, ...]) -> subprocess.Popen[str]:
    strace = subprocess.Popen(
        ["strace", "-f", "-y", "-s", "400", *options, "-p", str(pid)], stderr=subprocess.PIPE, text=True
    )
    assert strace.stderr is not None
    message = strace.stderr.readline()
    if not message.endswith("attached\n"):
        strace.kill()
        raise AssertionError(f"strace could not attach: {message}{strace.communicate()[1]}")
    return strace


def _live(
    started: Connection, output: str, errors: str, life: Callable[..., None], arguments: tuple[object, ...]
) -> None:
    for path, descriptor in ((output, 1), (errors, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.dont_write_bytecode = True  # the first life would make other calls than the next
    started.send("ready")
    started.recv()
    life(*arguments)  # from here on every call is the life's own
