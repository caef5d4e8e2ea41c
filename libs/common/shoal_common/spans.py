"""Spans of time as people write them: `90`, `15min`, `12h`, `7d`."""

from __future__ import annotations

import re

from shoal_common.errors import BadInput

_SPAN = re.compile(r"([0-9]{1,9})\s*(s|m|min|h|d)?")
_SPAN_S = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def parse_seconds(text: str) -> int:
    """Seconds of `90`, `90 s`, `15min`, `12h`, `7d`. Raises BadInput."""
    match = _SPAN.fullmatch(text.strip().lower())
    if match is None:
        raise BadInput(f"{text[:80]!r} is not a span of time: write it like 12h or 7d")
    number, unit = match.groups()
    return int(number) * _SPAN_S[unit or "s"]
