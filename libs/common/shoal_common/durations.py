"""Durations as people write them: `90`, `15min`, `12h`, `7d`."""

from __future__ import annotations

import re

from shoal_common.errors import BadInput

_DURATION = re.compile(r"([0-9]{1,9})\s*(s|m|min|h|d)?")
_UNIT_S = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def parse_duration_s(text: str) -> int:
    """Return the seconds of `90`, `90 s`, `15min`, `12h` or `7d`. Raises BadInput."""
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None:
        raise BadInput(f"{text[:80]!r} is not a duration: write it like 12h or 7d")
    number, unit = match.groups()
    return int(number) * _UNIT_S[unit or "s"]
