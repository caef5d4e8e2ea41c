"""A model's shape, read from its config.json and the headers of its safetensors files (`safetensors_header.py`).

No tensor is read. docs/memory.md says what is computed from a shape, and for which architectures it is exact.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from shoal_common.errors import Corrupt, Unsupported
from shoal_common.messages.model_shape import KvRule, ModelShape
from shoal_common.models.kv_cache import CONFIG_DEFAULTS, LATENT, LayerFacts, kv_rule, module_of
from shoal_common.models.layer_tensors import LAYER
from shoal_common.models.safetensors_header import PREFIX_BYTES, Tensor, header_end, parse_tensors

DEFAULT_CONTEXT_TOKENS = 4096
_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "F32": 4, "F16": 2, "BF16": 2}
_NOT_TEXT = re.compile(
    r"(?:^|\.)(?:mtp|visual|vision_tower|vision_model|vision_encoder|multi_modal_projector|audio_tower|"
    r"embed_vision|embed_audio|vision_projection)\."
)
"""Tensors that mlx-lm does not load: vision and audio towers, heads that predict further tokens."""
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|word_embeddings|tok_embeddings|embeddings|wte)\.")
_EXPERTS = re.compile(r"\.(?:experts|switch_mlp|switch_glu)\.")
"""Tensors of the experts that a router chooses from; shared experts have other names."""
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN_COUNTS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_k", "moe_topk")
_SCORES_WITH_SINKS = 3
"""Copies of the attention scores in memory at once where attention sinks are joined to them."""


def tensor_bytes(path: Path) -> dict[str, int]:
    """Return the bytes of each tensor in a safetensors file. Raises Corrupt if the header is invalid."""
    return {name: tensor.size_bytes for name, tensor in read_tensors(path).items()}


def read_ranges(path: Path) -> dict[str, tuple[int, int]]:
    """Return the byte range [start, end) of each tensor in a safetensors file. Raises Corrupt if it is invalid."""
    return {name: (tensor.start, tensor.end) for name, tensor in read_tensors(path).items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a safetensors file's header. Raises Corrupt if it is invalid."""
    with path.open("rb") as f:
        prefix = f.read(PREFIX_BYTES)
        header = prefix + f.read(header_end(prefix, path.name) - PREFIX_BYTES)
    return parse_tensors(header, path.name)


class _Weights(msgspec.Struct):
    """A model's tensor sizes, by purpose."""

    layer_bytes: list[int]
    expert_bytes: list[int]
    """Of a layer's bytes, those of the experts that a router chooses from."""
    kv_rows: list[int]
    """Numbers per token from the layer's key and value projections; 0 if it has none of that name."""
    embed_bytes: int = 0
    head_bytes: int = 0
    own_head: bool = False
    embedding: dict[str, str] = {}
    """Dtypes of the embedding's tensors, by the last part of their names."""
    state_dtype: str = ""
    unpacked: bool = False
    """Whether weights are 8-bit floats, which mlx-lm converts to 16-bit ones when it loads them."""


def _sum_weights(tensors: Mapping[str, Tensor], layers: int, drops_head: bool) -> _Weights:
    weights = _Weights([0] * layers, [0] * layers, [0] * layers)
    for name, tensor in tensors.items():
        size = tensor.size_bytes
        if _NOT_TEXT.search(name) or "rotary_emb.inv_freq" in name:
            continue
        if tensor.dtype.startswith("F8_") and f"{name}_scale_inv" in tensors:
            size, weights.unpacked = 2 * size, True
        match = LAYER.search(name)
        if match:
            # Layers past the count predict further tokens: no stage has them.
            if (layer := int(match.group(1))) < layers:
                weights.layer_bytes[layer] += size
                weights.expert_bytes[layer] += size if _EXPERTS.search(name) else 0
                if name.endswith(("attn.k_proj.weight", "attn.v_proj.weight")):
                    weights.kv_rows[layer] += tensor.rows
                if name.endswith("A_log"):
                    weights.state_dtype = tensor.dtype
        elif _EMBEDDING.search(name):
            weights.embed_bytes += size
            weights.embedding[name.rpartition(".")[2]] = tensor.dtype
        elif "lm_head" in name:
            weights.own_head = not drops_head
            weights.head_bytes += 0 if drops_head else size
        else:
            weights.head_bytes += size
    return weights


def compute_model_shape(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelShape:
    """Return the shape of a decoder-only language model. Raises Unsupported if Shoal cannot split it into layers."""
    model_type = str(config.get("model_type", ""))
    inner = config.get("text_config", {})
    module = module_of(model_type)
    if module not in CONFIG_DEFAULTS and isinstance(inner, Mapping):
        module = module_of(str(inner.get("model_type", model_type)).removesuffix("_text")) if inner else module
    text = {**CONFIG_DEFAULTS.get(module, {}), **config, **inner}
    layers = int(text.get("num_hidden_layers") or 0)
    hidden, heads = int(text.get("hidden_size") or 0), int(text.get("num_attention_heads") or 0)
    heads = heads or int(text.get("num_heads") or 1) if "state_size" in text else heads
    if min(layers, hidden, heads) < 1:
        raise Unsupported(f"{config.get('model_type', 'this model')!r} is not a language model that Shoal supports")
    if layers > len(tensors):
        raise Unsupported("its config.json has more layers than its safetensors files have tensors")
    weights = _sum_weights(tensors, layers, drops_head=text.get("tie_word_embeddings") is True)
    if not all(weights.layer_bytes):
        raise Unsupported("some layers have no tensors in this model's safetensors files")
    kv_heads = int(text.get("num_key_value_heads") or heads)
    head_dim = int(text.get("head_dim") or hidden // heads)
    element = _element_bytes(weights, text)
    rules, known = _rules(module, text, weights, 2 * kv_heads * head_dim, element)
    tied = not weights.own_head
    chunk_bytes, context_bytes = _activations(module, text, weights, element)
    scores = {"gpt_oss": _SCORES_WITH_SINKS}.get(module, 2 if module in LATENT else 1)
    return ModelShape(
        architecture=model_type,
        layer_bytes=weights.layer_bytes,
        embed_bytes=weights.embed_bytes,
        # A head tied to the embedding needs the embedding's tensors on the last stage too.
        head_bytes=weights.head_bytes + (weights.embed_bytes if tied else 0),
        tied=tied,
        # For readers that do not know `kv_rules`: the maximum over all layers.
        kv_bytes_per_token_layer=max(r.bytes_per_token + -(-r.constant_bytes // 256) for r in rules),
        context_tokens=int(text.get("max_position_embeddings") or DEFAULT_CONTEXT_TOKENS),
        hidden_bytes=hidden * element,
        kv_rules=rules,
        layer_active_bytes=_active_bytes(text, weights),
        chunk_bytes_per_token=chunk_bytes,
        context_bytes_per_token=context_bytes,
        score_bytes=scores * heads * element,
        fused_score_bytes=heads * element if module in LATENT else 0,
        head_dim=int(text.get("v_head_dim") or head_dim),
        estimated=not known or weights.unpacked,
    )


def _element_bytes(weights: _Weights, text: Mapping[str, Any]) -> int:
    """Return the bytes of one number of a hidden state; its type is the embedding's, or its scales' if quantized."""
    for dtype in (weights.embedding.get("scales"), weights.embedding.get("weight"), text.get("torch_dtype")):
        if str(dtype) in _DTYPE_BYTES:
            return _DTYPE_BYTES[str(dtype)]
    return _DTYPE_BYTES.get(str(text.get("dtype")), 2)


def _rules(
    module: str, text: Mapping[str, Any], weights: _Weights, config_width: int, element: int
) -> tuple[list[KvRule], bool]:
    """Return a rule for each layer, and whether the rules are known; else the dense one, by the larger source."""
    count, widest = len(weights.layer_bytes), max(*weights.kv_rows, config_width)
    rules: list[KvRule] = []
    for index, rows in enumerate(weights.kv_rows):
        state_bytes = max(element, _DTYPE_BYTES.get(weights.state_dtype, element))
        layer = LayerFacts(index, count, (rows or config_width) * element, element, state_bytes)
        rule = kv_rule(module, text, layer)
        if rule is None:
            return [KvRule(bytes_per_token=widest * element)] * count, False
        rules.append(rule)
    return rules, True


def _first(text: Mapping[str, Any], names: tuple[str, ...]) -> int:
    return next((int(text[name]) for name in names if text.get(name)), 0)


def _active_bytes(text: Mapping[str, Any], weights: _Weights) -> list[int]:
    """Return the bytes that one token reads of each layer; of the experts, those chosen for it."""
    count, chosen = _first(text, _EXPERT_COUNTS), _first(text, _CHOSEN_COUNTS)
    if not 0 < chosen < count:
        return weights.layer_bytes
    pairs = zip(weights.layer_bytes, weights.expert_bytes, strict=True)
    return [total - experts + experts * chosen // count for total, experts in pairs]


def _activations(module: str, text: Mapping[str, Any], weights: _Weights, element: int) -> tuple[int, int]:
    """Return a pass's bytes besides the caches: per token of its chunk, and per token of its context."""
    hidden, heads = int(text["hidden_size"]), int(text.get("num_attention_heads") or 0)
    kv_heads = int(text.get("num_key_value_heads") or heads)
    head_dim = int(text.get("head_dim") or (hidden // heads if heads else 0))
    attention, context = (heads + 2 * kv_heads) * head_dim, 0
    if module in LATENT or module == "deepseek_v2":
        rope, plain, value = (int(text[k]) for k in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
        if module in LATENT:
            attention = heads * (rope + plain) + int(text["kv_lora_rank"]) + rope
            context = heads * (plain + value) * element
        else:
            attention = heads * (2 * (rope + plain) + value)
    inner = int(text.get("intermediate_size") or text.get("block_ff_dim") or 4 * hidden)
    chosen = _first(text, _CHOSEN_COUNTS) if any(weights.expert_bytes) else 0
    if chosen:
        expert = int(text.get("moe_intermediate_size") or text.get("intermediate_size") or 4 * hidden)
        shared = int(text.get("shared_expert_intermediate_size") or expert * int(text.get("n_shared_experts") or 0))
        # Each token's state exists once per chosen expert, before and after it.
        routed = 3 * (chosen * expert + shared) + 2 * chosen * hidden
        inner_all = routed if all(weights.expert_bytes) else max(routed, 3 * inner)
    else:
        inner_all = 3 * inner
    return element * (4 * hidden + inner_all + attention), context


def read_config(view: Path) -> dict[str, Any]:
    """Read the config.json of a directory. Raises Unsupported or Corrupt."""
    try:
        return dict(json.loads((view / "config.json").read_text()))
    except FileNotFoundError:
        raise Unsupported("it has no config.json") from None
    except (ValueError, TypeError, RecursionError) as e:
        raise Corrupt(f"config.json cannot be read: {e}") from None


def read_model_shape(view: Path) -> ModelShape:
    """Return the shape of the model in a directory. Raises Unsupported or Corrupt, naming what is missing."""
    config = read_config(view)
    files = sorted(view.glob("model*.safetensors"))
    if not files:
        raise Unsupported("it has no model*.safetensors files")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(read_tensors(file))
    return parse_model_shape(config, tensors)


def parse_model_shape(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelShape:
    """Return `model_shape` of foreign input; raises Unsupported also for a config that makes no sense."""
    try:
        return compute_model_shape(config, tensors)
    except (ValueError, TypeError, AttributeError, OverflowError, KeyError, ZeroDivisionError) as e:
        raise Unsupported(f"its config.json is not that of a language model: {e}") from None
