"""Sizes, rates and durations as people write and read them. Pure.

`200GB` is 200 x 10^9 bytes, `200GiB` is 200 x 2^30. A number without a unit is refused, except 0: whoever writes 20
may mean bytes or gigabytes, seconds or days.
"""

from __future__ import annotations

import re
from decimal import Decimal

from shoal_common.errors import BadInput

_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*(?:([kmgtp]?)(i?)b?)", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_DURATION = re.compile(r"([0-9]{1,9})\s*(s|m|min|h|d)?")
_UNIT_S = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_BARE_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]*)?")


def parse_bytes(text: str) -> int:
    """Return the bytes of `512B`, `100 MB`, `1.5TiB` or `0`; `200G` is decimal. Raises BadInput."""
    return _parse_size(text.strip(), "")


def parse_rate(text: str) -> int:
    """Return the bytes per second of `20MB`, `20MB/s` or `0`. Raises BadInput."""
    return _parse_size(text.strip().removesuffix("/s"), "/s")


def _parse_size(text: str, per: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None or (match.group(3) and not match.group(2)):
        raise BadInput(f"{text[:80]!r} is not a size: write it like 200GB (decimal) or 200GiB (binary)")
    _refuse_bare(text, tuple(f"{unit}{per}" for unit in ("B", "kB", "MB", "GB", "TB", "MiB", "GiB")))
    number, prefix, binary = match.groups()
    return int(Decimal(number) * (1024 if binary else 1000) ** _POWERS[prefix.lower()])


def parse_duration_s(text: str) -> int:
    """Return the seconds of `90 s`, `15min`, `12h`, `7d` or `0`. Raises BadInput."""
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None:
        raise BadInput(f"{text[:80]!r} is not a duration: write it like 12h or 7d")
    _refuse_bare(text.strip(), ("s", "min", "h", "d"))
    number, unit = match.groups()
    return int(number) * _UNIT_S[unit or "s"]


def _refuse_bare(text: str, units: tuple[str, ...]) -> None:
    if _BARE_NUMBER.fullmatch(text) and float(text) != 0:
        raise BadInput(f"{text[:20]} has no unit: write {', '.join(text[:20] + unit for unit in units)}")


def format_bytes(size_bytes: float) -> str:
    """Return a size for people, decimal as disks are sold: `812 B`, `4.6 kB`, `12.3 GB`."""
    power = 0
    # 999.95 would print as 1000.0: such a number belongs to the next unit.
    while size_bytes >= 999.95 and power < len(_UNITS) - 1:
        size_bytes, power = size_bytes / 1000, power + 1
    return f"{size_bytes:.0f} {_UNITS[power]}" if power == 0 else f"{size_bytes:.1f} {_UNITS[power]}"


def format_rate(bytes_per_s: float) -> str:
    """Return a rate for people: `20.0 MB/s`."""
    return f"{format_bytes(bytes_per_s)}/s"


def format_duration(seconds: float) -> str:
    """Return a duration for people: `42 s`, `3 min 05 s`, `2 h 10 min`, `3 d 4 h`."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    if total < 86400:
        return f"{total // 3600} h {total % 3600 // 60:02d} min"
    return f"{total // 86400} d {total % 86400 // 3600} h"


def format_count(number: int, noun: str) -> str:
    """Return `1 blob`, `2 leaves`."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun.removesuffix('f')}ves" if noun.endswith("leaf") else f"{number} {noun}s"
