"""Byte ranges of a model's tensors in its safetensors files, and which tensors a stage needs (docs/sparse.md). Pure.

A safetensors file begins with the header's length (`<Q`) and the header: JSON from tensor names to their dtype,
shape and data_offsets, which count from the header's end.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from shoal_common.errors import BadInput, Corrupt, Unsupported

MAX_HEADER_BYTES = 100 << 20
"""The format's own limit."""
PREFIX_BYTES = 8
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


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


def tensors_of(header: bytes, name: str) -> dict[str, Tensor]:
    """Return a file's tensors by name, from the file's bytes up to the header's end. Raises Corrupt."""
    begin = len(header)
    try:
        entries = json.loads(header[PREFIX_BYTES:])
        return {n: _tensor(begin, t) for n, t in entries.items() if n != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise Corrupt(f"the safetensors header of {name} cannot be read: {e}") from None


def tensor_ranges(header: bytes, name: str) -> dict[str, tuple[int, int]]:
    """Return each tensor's byte range [start, end), from the file's bytes up to the header's end. Raises Corrupt."""
    return {n: (t.start, t.end) for n, t in tensors_of(header, name).items()}


def _tensor(begin: int, entry: Mapping[str, Any]) -> Tensor:
    start, end = _range(begin, *entry["data_offsets"])
    shape = entry.get("shape")
    rows = shape[0] if isinstance(shape, list) and shape and type(shape[0]) is int else 0
    return Tensor(start, end, str(entry.get("dtype", "")), rows)


def _range(begin: int, start: object, end: object) -> tuple[int, int]:
    if not (type(start) is int and type(end) is int and 0 <= start <= end):
        raise ValueError(f"a tensor's range is {start!r} to {end!r}")
    return begin + start, begin + end


def check_layers(layers: Sequence[int]) -> tuple[int, int]:
    """Return foreign layers as `[first, last)`. Raises BadInput."""
    if len(layers) != 2 or not 0 <= layers[0] < layers[1]:
        raise BadInput(f"{list(layers)[:4]} is not a range of layers: give [first, last), for example [0, 14]")
    return layers[0], layers[1]


def covers(have: Iterable[Sequence[int]], layers: Sequence[int]) -> bool:
    """Return whether one of these ranges of layers contains all of `layers`."""
    return any(first <= layers[0] and layers[1] <= last for first, last in have)


def union(runs: Iterable[Sequence[int]]) -> list[list[int]]:
    """Return ranges of layers in order, adjacent ones joined."""
    joined: list[list[int]] = []
    for first, last in sorted((first, last) for first, last in runs):
        if joined and first <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], last)
        else:
            joined.append([first, last])
    return joined


class StageTensors:
    """Which tensors of a model the stage with the layers [first, last) needs.

    The first stage needs the embedding, the last one norm and head, and the embedding too if the head is, or may be,
    tied to it: a config that does not say leaves it to the architecture's default. Tensors that are neither of a
    layer, nor embedding, norm or head, go to every stage.
    """

    def __init__(self, config: Mapping[str, Any], first: int, last: int) -> None:
        inner = config.get("text_config")
        text = {**config, **inner} if isinstance(inner, Mapping) else config
        count = text.get("num_hidden_layers")
        if type(count) is not int or not 0 <= first < last <= count:
            raise Unsupported(
                f"layers {first} to {last} of a model that has {count!r}: the layout is for another model"
            )
        self._first, self._last, self._count = first, last, count
        self._is_last = last == count
        self._embeds = first == 0 or (self._is_last and text.get("tie_word_embeddings") is not False)

    def needs(self, name: str) -> bool:
        """Return whether a tensor is needed, by its name."""
        match = LAYER.search(name)
        if match:
            # Layers past the count belong to modules that no stage computes, such as multi-token prediction.
            return self._first <= int(match.group(1)) < self._last
        if "embed_tokens" in name:
            return self._embeds
        if "lm_head" in name or name.endswith("norm.weight"):
            return self._is_last
        return True
