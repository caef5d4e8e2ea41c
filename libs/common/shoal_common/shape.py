"""A model's shape, read from its config.json and the headers of its safetensors files.

A safetensors file begins with the header's length (`<Q`) and the header: JSON from tensor names to their dtype,
shape and data_offsets. Nothing here reads a tensor.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal_common.errors import Corrupt, Unsupported
from shoal_common.messages.records import ModelShape

MAX_HEADER_BYTES = 100 << 20
"""The format's own limit."""
DEFAULT_CONTEXT_TOKENS = 4096
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def tensor_bytes(path: Path) -> dict[str, int]:
    """Bytes of each tensor in a safetensors file. Raises Corrupt when the header is not one."""
    with path.open("rb") as f:
        prefix = f.read(8)
        size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= size <= MAX_HEADER_BYTES:
            raise Corrupt(f"{path.name} does not begin with a safetensors header")
        raw = f.read(size)
    try:
        header = json.loads(raw)
        return {name: _size(*t["data_offsets"]) for name, t in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise Corrupt(f"the safetensors header of {path.name} cannot be read: {e}") from None


def _size(start: object, end: object) -> int:
    if not (isinstance(start, int) and isinstance(end, int) and 0 <= start <= end):
        raise ValueError(f"a tensor lies from {start!r} to {end!r}")
    return end - start


def model_shape(config: Mapping[str, Any], tensors: Mapping[str, int]) -> ModelShape:
    """The shape of a decoder-only language model. Raises Unsupported when it is not one that Shoal can lay out."""
    text = {**config, **config.get("text_config", {})}
    layers = int(text.get("num_hidden_layers") or 0)
    hidden, heads = int(text.get("hidden_size") or 0), int(text.get("num_attention_heads") or 0)
    if min(layers, hidden, heads) < 1:
        raise Unsupported(f"{config.get('model_type', 'this model')!r} is not a language model Shoal can lay out")
    if layers > len(tensors):
        raise Unsupported("its config.json speaks of more layers than its safetensors files have tensors")
    layer_bytes = [0] * layers
    embed = head = 0
    for name, size in tensors.items():
        match = _LAYER.search(name)
        if match and int(match.group(1)) < layers:
            layer_bytes[int(match.group(1))] += size
        elif "embed_tokens" in name:
            embed += size
        else:
            head += size
    if not all(layer_bytes):
        raise Unsupported("some layers have no tensors in this model's safetensors files")
    # A head tied to the embedding needs the embedding's tensors on the last stage too.
    tied = not any("lm_head" in name for name in tensors)
    if tied:
        head += embed
    kv_heads = int(text.get("num_key_value_heads") or heads)
    head_dim = int(text.get("head_dim") or hidden // heads)
    element = _DTYPE_BYTES.get(str(text.get("torch_dtype") or text.get("dtype")), 2)
    return ModelShape(
        architecture=str(config.get("model_type", "")),
        layer_bytes=layer_bytes,
        embed_bytes=embed,
        head_bytes=head,
        tied=tied,
        kv_bytes_per_token_layer=2 * kv_heads * head_dim * element,
        context_tokens=int(text.get("max_position_embeddings") or DEFAULT_CONTEXT_TOKENS),
        hidden_bytes=hidden * element,
    )


def read_shape(view: Path) -> ModelShape:
    """The shape of the model in a directory. Raises Unsupported or Corrupt, saying what is missing."""
    try:
        config = json.loads((view / "config.json").read_text())
    except FileNotFoundError:
        raise Unsupported("it has no config.json") from None
    except (ValueError, RecursionError) as e:
        raise Corrupt(f"config.json cannot be read: {e}") from None
    files = sorted(view.glob("model*.safetensors"))
    if not files:
        raise Unsupported("it has no model*.safetensors files")
    tensors: dict[str, int] = {}
    for file in files:
        tensors.update(tensor_bytes(file))
    try:
        return model_shape(config, tensors)
    except (ValueError, TypeError, AttributeError, OverflowError) as e:
        raise Unsupported(f"its config.json is not that of a language model: {e}") from None
