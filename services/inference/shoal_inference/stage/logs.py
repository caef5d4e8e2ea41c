"""The log of a stage process: the format of every Shoal service, with the instance and rank in each line."""

from __future__ import annotations

import logging
from typing import Any

from shoal_common.logs import configure_logging

SERVICE = "stage"


def configure(node: str = "-", level: str = "info", **fields: Any) -> None:
    """Log to stderr from now on; `fields` are part of every line. Peers' text goes into fields, which are escaped."""
    configure_logging(SERVICE, node, level)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_AddFields(fields))


class _AddFields(logging.Filter):
    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__()
        self._fields = fields

    def filter(self, record: logging.LogRecord) -> bool:
        record.fields = {**self._fields, **getattr(record, "fields", {})}
        return True
