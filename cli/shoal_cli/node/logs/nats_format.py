"""nats-server's log lines in Shoal's log format. Pure.

[4711] 2026/01/31 12:30:05.123456 [INF] Server is ready                      what nats-server writes, in local time
ts=2026-01-31T12:30:05.123Z level=info service=nats node=wren msg="Server is ready"
"""

from __future__ import annotations

import re
from datetime import UTC, datetime

from shoal_common.logs import FloodLimit, quote_value

_LINE = re.compile(rb"\[\d+\] (\d{4}/\d\d/\d\d \d\d:\d\d:\d\d\.\d{6}) \[([A-Z]{3})\](.*)", re.DOTALL)
_LEVELS = {b"INF": "info", b"DBG": "debug", b"TRC": "debug", b"WRN": "warning", b"ERR": "error", b"FTL": "critical"}
_CLIENT = re.compile(rb"\S+ - \w+:\d+ - ")
_KIND_BYTES = 20


class NatsLog:
    """The log of one nats-server. Warnings and errors that its clients cause cannot flood it."""

    def __init__(self, node: str) -> None:
        self._node, self._limit = node, FloodLimit()

    def translate(self, line: bytes, now_s: float) -> bytes:
        """Return a line in Shoal's format; nothing if it is left out."""
        match = _LINE.fullmatch(line.removesuffix(b"\n"))
        if match is None or match[2] not in (b"WRN", b"ERR"):
            return translate(line, self._node, now_s)
        # What follows may quote the client: the beginning says what it is about.
        kind = _CLIENT.sub(b"", match[3].strip())[:_KIND_BYTES]
        left_out = self._limit.admit(kind, now_s)
        if left_out is None:
            return b""
        more = f" left_out={left_out}\n" if left_out else "\n"
        return translate(line, self._node, now_s).removesuffix(b"\n") + more.encode()


def translate(line: bytes, node: str, now_s: float) -> bytes:
    """Return a line of nats-server in Shoal's format, the end of line included.

    A line that is not in its format is written before its logger runs (an invalid configuration) or by a crash: it
    becomes an error of `now_s`. A whole text is kept, whatever it holds.
    """
    text = line.removesuffix(b"\n")
    match = _LINE.fullmatch(text)
    at, level = datetime.fromtimestamp(now_s, UTC), "error"
    if match is not None:
        try:
            at = datetime.strptime(match[1].decode(), "%Y/%m/%d %H:%M:%S.%f").astimezone(UTC)
        except (ValueError, OverflowError):
            match = None
        else:
            level, text = _LEVELS.get(match[2], "info"), match[3]
    stamp = f"{at:%Y-%m-%dT%H:%M:%S}.{at.microsecond // 1000:03d}Z"
    message = quote_value(text.decode(errors="replace").strip())
    return f"ts={stamp} level={level} service=nats node={node} msg={message}\n".encode()


def message_of(line: str) -> str:
    """Return the message of a translated line."""
    return line.partition(" msg=")[2].strip('"') or line
