"""Read a safetensors header: tensors and their byte ranges."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import msgspec

from shoal_common.errors import Corrupt

MAX_HEADER_BYTES = 100 << 20
"""The format's own limit."""
PREFIX_BYTES = 8


def header_end(prefix: bytes, name: str) -> int:
    """Return the offset where a file's header ends and its tensors begin, by its first 8 bytes. Raises Corrupt."""
    size = struct.unpack("<Q", prefix)[0] if len(prefix) == PREFIX_BYTES else 0
    if not 2 <= size <= MAX_HEADER_BYTES:
        raise Corrupt(f"{name} does not begin with a safetensors header")
    return PREFIX_BYTES + int(size)


class Tensor(msgspec.Struct, frozen=True):
    """A tensor in a header."""

    start: int
    """First byte in the file; `end` is after the last one."""
    end: int
    dtype: str = ""
    """In safetensors' notation: F32, BF16, U32, F8_E4M3, …"""
    rows: int = 0
    """First dimension, which packing of quantized weights leaves unchanged."""

    @property
    def size_bytes(self) -> int:
        """Size of the tensor."""
        return self.end - self.start


def parse_tensors(header: bytes, name: str) -> dict[str, Tensor]:
    """Return a file's tensors by name, from the file's bytes up to the header's end. Raises Corrupt."""
    begin = len(header)
    try:
        entries = json.loads(header[PREFIX_BYTES:])
        return {n: _tensor(begin, t) for n, t in entries.items() if n != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise Corrupt(f"the safetensors header of {name} cannot be read: {e}") from None


def parse_tensor_ranges(header: bytes, name: str) -> dict[str, tuple[int, int]]:
    """Return each tensor's byte range [start, end), from the file's bytes up to the header's end. Raises Corrupt."""
    return {n: (t.start, t.end) for n, t in parse_tensors(header, name).items()}


def _tensor(begin: int, entry: Mapping[str, Any]) -> Tensor:
    start, end = _range(begin, *entry["data_offsets"])
    shape = entry.get("shape")
    rows = shape[0] if isinstance(shape, list) and shape and type(shape[0]) is int else 0
    return Tensor(start, end, str(entry.get("dtype", "")), rows)


def _range(begin: int, start: object, end: object) -> tuple[int, int]:
    if not (type(start) is int and type(end) is int and 0 <= start <= end):
        raise ValueError(f"a tensor's range is {start!r} to {end!r}")
    return begin + start, begin + end
