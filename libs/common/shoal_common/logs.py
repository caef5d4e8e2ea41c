"""Logs: one line per event, key=value, with aligned columns on a terminal. No warning or error can flood them."""

from __future__ import annotations

import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, TextIO

from shoal_common.redaction import redact

FLOOD_BURST = 100
"""Warnings and errors of one kind that are logged at once; further ones are as rare as the interval says."""
FLOOD_INTERVAL_S = 5.0
_MAX_KINDS = 256

_PLAIN = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.:/@+,[]{}()%*=")
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def quote_value(value: object) -> str:
    """Return a value as it is written after `key=`: bare if it is one plain word, else quoted on one line."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    if text and all(c in _PLAIN for c in text) and "=" not in text:
        return text
    return f'"{"".join(map(_escape, text))}"'


def _escape(c: str) -> str:
    # Characters that a terminal or a line reader acts on are escaped: a log line cannot be forged or split.
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
        return redact(self._format(record))

    def _format(self, record: logging.LogRecord) -> str:
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


class _Allowance:
    """How many lines of one kind may be logged, and how many were left out."""

    def __init__(self, now_s: float) -> None:
        self.lines, self.at_s, self.left_out = float(FLOOD_BURST), now_s, 0


class FloodLimit:
    """Which lines are logged, where others may cause as many as they like."""

    def __init__(self) -> None:
        self._allowances: OrderedDict[Hashable, _Allowance] = OrderedDict()

    def admit(self, kind: Hashable, now_s: float) -> int | None:
        """Return how many lines of this kind were left out before this one; None if it is left out too."""
        allowance = self._allowances.setdefault(kind, _Allowance(now_s))
        self._allowances.move_to_end(kind)
        if len(self._allowances) > _MAX_KINDS:
            self._allowances.popitem(last=False)
        passed_s = max(now_s - allowance.at_s, 0.0)
        allowance.lines, allowance.at_s = min(allowance.lines + passed_s / FLOOD_INTERVAL_S, FLOOD_BURST), now_s
        if allowance.lines < 1:
            allowance.left_out += 1
            return None
        left_out, allowance.left_out = allowance.left_out, 0
        allowance.lines -= 1
        return left_out


class _FloodFilter(logging.Filter):
    """Leaves out warnings and errors that come too often; the next that is logged counts them.

    A kind is a message of one logger without its fields: what strangers cause differs in its fields only.
    """

    def __init__(self) -> None:
        super().__init__()
        self._limit = FloodLimit()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        kind = record.name, record.lineno, str(record.msg).partition("\n")[0]
        left_out = self._limit.admit(kind, record.created)
        if left_out:
            record.fields = {**getattr(record, "fields", {}), "left_out": left_out}
        return left_out is not None


class StructuredLogger:
    """A logger whose calls carry fields: `log.info("blob committed", blob=name, size_bytes=n)`."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(f"shoal.{name}")

    def debug(self, text: str, **fields: Any) -> None:
        """Log details for debugging."""
        self._logger.debug(text, extra={"fields": fields})

    def info(self, text: str, **fields: Any) -> None:
        """Log a normal event."""
        self._logger.info(text, extra={"fields": fields})

    def warning(self, text: str, **fields: Any) -> None:
        """Log something an operator may have to look into; Shoal carries on."""
        self._logger.warning(text, extra={"fields": fields})

    def error(self, text: str, exc: BaseException | None = None, **fields: Any) -> None:
        """Log a failure, with the exception if it is a foreign one."""
        self._logger.error(text, exc_info=exc, extra={"fields": fields})


def configure_logging(service: str, node: str, level: str = "info", stream: TextIO | None = None) -> None:
    """Send this process's logs to `stream` (stderr). Libraries log from warning level up."""
    out = stream or sys.stderr
    handler = logging.StreamHandler(out)
    handler.setFormatter(_Formatter(service, node, out.isatty()))
    handler.addFilter(_FloodFilter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("shoal").setLevel(level.upper())
    # nats-py logs each refused reconnection with a trace; connection.py logs it in one line.
    logging.getLogger("nats").setLevel(logging.CRITICAL)
