"""Logs of a stage: stderr, one line each, whatever a peer or an exception puts into the message."""

from __future__ import annotations

import logging


class OneLine(logging.Formatter):
    """Newlines become `\\n`: the parent reads stderr by lines, and a peer's words must not forge one."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\r", "\\r").replace("\n", "\\n")


def configure(prefix: str) -> None:
    """Log to stderr from now on, each line naming the stage."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine(f"%(asctime)s %(levelname)s {prefix} %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
