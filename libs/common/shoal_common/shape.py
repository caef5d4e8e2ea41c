"""A model's shape, read from its config.json and the headers of its safetensors files (`tensors.py`).

Nothing here reads a tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal_common.errors import Corrupt, Unsupported
from shoal_common.messages.records import ModelShape
from shoal_common.tensors import LAYER, PREFIX_BYTES, header_end, tensor_ranges

DEFAULT_CONTEXT_TOKENS = 4096
_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def tensor_bytes(path: Path) -> dict[str, int]:
    """Bytes of each tensor in a safetensors file. Raises Corrupt when the header is not one."""
    return {name: end - start for name, (start, end) in read_ranges(path).items()}


def read_ranges(path: Path) -> dict[str, tuple[int, int]]:
    """The bytes [start, end) of each tensor in a safetensors file. Raises Corrupt when the header is not one."""
    with path.open("rb") as f:
        prefix = f.read(PREFIX_BYTES)
        header = prefix + f.read(header_end(prefix, path.name) - PREFIX_BYTES)
    return tensor_ranges(header, path.name)


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
        match = LAYER.search(name)
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
