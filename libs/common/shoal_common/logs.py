"""Logs: one line an event. key=value where no terminal reads, aligned columns where one does."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any, TextIO

_PLAIN = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.:/@+,[]{}()%*=")
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def quote_value(value: object) -> str:
    """A value as it stands after `key=`: bare when it is one plain word, else quoted and on one line."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    if text and all(c in _PLAIN for c in text) and "=" not in text:
        return text
    return f'"{"".join(map(_escape, text))}"'


def _escape(c: str) -> str:
    # Whatever a terminal or a line reader might act on is spelled out: a log line cannot be forged or split.
    if c in _ESCAPES:
        return _ESCAPES[c]
    return c if c.isprintable() else f"\\u{{{ord(c):x}}}"


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else _escape(c) for c in text)


class _Formatter(logging.Formatter):
    def __init__(self, service: str, node: str, terminal: bool) -> None:
        super().__init__()
        self._who = f"service={service} node={node}"
        self._service, self._terminal = service, terminal

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, "fields", {})
        pairs = "".join(f" {k}={quote_value(v)}" for k, v in fields.items())
        if record.exc_info:
            pairs += f" trace={quote_value(self.formatException(record.exc_info))}"
        text = record.getMessage()
        if self._terminal:
            clock = time.strftime("%H:%M:%S", time.localtime(record.created))
            return f"{clock} {record.levelname[:4].lower():4} {self._service:10} {_one_line(text)}{pairs}"
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        level = record.levelname.lower()
        return f"ts={stamp}.{int(record.msecs):03d}Z level={level} {self._who} msg={quote_value(text)}{pairs}"


class Log:
    """A logger whose calls carry fields: `log.info("blob committed", blob=name, size_bytes=n)`."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(f"shoal.{name}")

    def debug(self, text: str, **fields: Any) -> None:
        """For the one who debugs."""
        self._logger.debug(text, extra={"fields": fields})

    def info(self, text: str, **fields: Any) -> None:
        """Something happened as it should."""
        self._logger.info(text, extra={"fields": fields})

    def warning(self, text: str, **fields: Any) -> None:
        """Something that an operator may want to look at; Shoal carries on."""
        self._logger.warning(text, extra={"fields": fields})

    def error(self, text: str, exc: BaseException | None = None, **fields: Any) -> None:
        """Something failed; with the exception when it is a stranger."""
        self._logger.error(text, exc_info=exc, extra={"fields": fields})


def set_up(service: str, node: str, level: str = "info", stream: TextIO | None = None) -> None:
    """Send all logs of this process to `stream` (stderr). Libraries speak from warning up."""
    out = stream or sys.stderr
    handler = logging.StreamHandler(out)
    handler.setFormatter(_Formatter(service, node, out.isatty()))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("shoal").setLevel(level.upper())
    # nats-py logs each refused reconnection with a trace; connection.py says the same in one line.
    logging.getLogger("nats").setLevel(logging.CRITICAL)
