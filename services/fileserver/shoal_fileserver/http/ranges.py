"""Parses Range headers (RFC 9110 §14). Pure."""

from __future__ import annotations

import re

import msgspec

MAX_HEADER_CHARS = 100
_ONE_RANGE = re.compile(r"bytes=([0-9]{1,19})?-([0-9]{1,19})?")


class AllBytes(msgspec.Struct, frozen=True):
    """All bytes: no Range header, or one that a server may ignore (another unit, several ranges)."""


class ByteRange(msgspec.Struct, frozen=True):
    """Bytes [start, end)."""

    start: int
    end: int


class Unsatisfiable(msgspec.Struct, frozen=True):
    """No such bytes: 416."""


def parse_range(header: str | None, size_bytes: int) -> AllBytes | ByteRange | Unsatisfiable:
    """Return the bytes that a Range header means in a file of this size, clipped to the file as the RFC says."""
    if header is None or len(header) > MAX_HEADER_CHARS:
        return AllBytes()
    match = _ONE_RANGE.fullmatch(header.strip())
    if match is None or match.groups() == (None, None):
        return AllBytes()
    first, last = match.groups()
    if first is None:
        suffix = min(int(last or 0), size_bytes)
        return ByteRange(size_bytes - suffix, size_bytes) if suffix else Unsatisfiable()
    start = int(first)
    end = size_bytes if last is None else min(int(last) + 1, size_bytes)
    if last is not None and int(last) < start:
        return AllBytes()
    return ByteRange(start, end) if start < size_bytes else Unsatisfiable()
