"""Sizes, rates and durations as people write and read them. Pure.

`200GB` is 200 x 10^9 bytes, `200GiB` is 200 x 2^30.
"""

from __future__ import annotations

import re
from decimal import Decimal

from shoal_common.errors import BadInput

_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*(?:([kmgtp]?)(i?)b?)", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def parse_size(text: str) -> int:
    """Return the bytes of `512`, `100 MB`, `1.5TiB`; a bare `200G` is decimal. Raises BadInput."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match.group(3) and not match.group(2)):
        raise BadInput(f"{text[:80]!r} is not a size: write it like 200GB (decimal) or 200GiB (binary)")
    number, prefix, binary = match.groups()
    return int(Decimal(number) * (1024 if binary else 1000) ** _POWERS[prefix.lower()])


def parse_limit(text: str) -> int | None:
    """Return a size, or None for `none`: no limit. Raises BadInput."""
    return None if text.strip().lower() == "none" else parse_size(text)


def parse_rate(text: str) -> int | None:
    """Return the bytes per second of `20MB` or `20MB/s`, at least 1; None for `none`: no limit. Raises BadInput."""
    rate = parse_limit(text.strip().removesuffix("/s"))
    if rate is not None and rate < 1:
        raise BadInput(f"{text[:80]!r} is not a rate: write it like 20MB, or none for no limit")
    return rate


def show_rate(bytes_per_s: int | None) -> str:
    """Return a limit for people: `20.0 MB/s`, `no limit`."""
    return "no limit" if bytes_per_s is None else f"{show_bytes(bytes_per_s)}/s"


def show_bytes(count: float) -> str:
    """Return a size for people, decimal: `812 B`, `4.6 kB`, `12.3 GB`."""
    power = 0
    # 999.95 would print as 1000.0: such a number belongs to the next unit.
    while count >= 999.95 and power < len(_UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.0f} {_UNITS[power]}" if power == 0 else f"{count:.1f} {_UNITS[power]}"


def show_seconds(seconds: float) -> str:
    """Return a duration for people: `42 s`, `3 min 05 s`, `2 h 10 min`, `3 d 4 h`."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    if total < 86400:
        return f"{total // 3600} h {total % 3600 // 60:02d} min"
    return f"{total // 86400} d {total % 86400 // 3600} h"


def count(number: int, noun: str) -> str:
    """Return `1 blob`, `2 leaves`."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun.removesuffix('f')}ves" if noun.endswith("leaf") else f"{number} {noun}s"
