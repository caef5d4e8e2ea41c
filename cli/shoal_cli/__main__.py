"""Entry point: `python -m shoal_cli`, and the `shoal` script."""

import sys

from shoal_cli.cli import run


def main() -> int:
    """Run one command. Returns the exit code."""
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
