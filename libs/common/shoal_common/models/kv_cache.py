"""Size of mlx-lm's KV caches for each layer of a model, by architecture (docs/memory.md). Pure.

A rule states what `make_cache` of mlx-lm's module returns for a layer: a KVCache grows with the context, a
RotatingKVCache up to a window, and an ArraysCache (state-space and linear attention) has the same size for one token
as for a million. A test builds each architecture of the table with mlx-lm and measures its caches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from shoal_common.messages.model_shape import KvRule

KV_CACHE_STEP_TOKENS = 256
"""mlx-lm's caches grow by this many tokens."""
MAX_REQUESTS_PER_INSTANCE = 8
"""Max concurrent requests per instance; they share its KV budget."""

_NAMED_IN_MLX_LM = {
    "mistral": "llama",
    "iquestcoder": "llama",
    "xverse": "llama",
    "falcon_mamba": "mamba",
    "joyai_llm_flash": "deepseek_v3",
    "kimi_k2": "deepseek_v3",
}
"""The entries of mlx-lm's MODEL_REMAPPING that the table below has rules for."""

CONFIG_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "gemma3": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 512},
    "gemma3_text": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512},
    "gpt_oss": {"head_dim": 64, "num_key_value_heads": 8, "sliding_window": 128},
    "cohere2": {"sliding_window": 4096},
    "deepseek_v2": {"qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128},
    "deepseek_v3": {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128},
}
"""mlx-lm's defaults for what a config.json leaves out, as Gemma 3's do."""


def cache_steps(tokens: int) -> int:
    """Return the cache steps that hold this many tokens."""
    return -(-tokens // KV_CACHE_STEP_TOKENS)


class LayerFacts(msgspec.Struct, frozen=True):
    """One layer, as read from the files."""

    index: int
    count: int
    dense_bytes: int
    """Bytes of one token's keys and values by the dense rule."""
    element_bytes: int
    """Bytes of one number of a hidden state."""
    state_bytes: int = 4
    """Bytes of one number of a state-space layer's state: A_log's type, in which it is computed."""


Rule = Callable[[Mapping[str, Any], LayerFacts], KvRule]


def _full(_config: Mapping[str, Any], layer: LayerFacts) -> KvRule:
    return KvRule(bytes_per_token=layer.dense_bytes)


def _window(config: Mapping[str, Any], layer: LayerFacts) -> KvRule:
    return KvRule(bytes_per_token=layer.dense_bytes, window_tokens=int(config["sliding_window"]))


def _by_layer_types(full: str, default: Callable[[LayerFacts], bool]) -> Rule:
    """Window unless `layer_types` says `full`; without `layer_types`, window where `default` says so."""

    def rule(config: Mapping[str, Any], layer: LayerFacts) -> KvRule:
        types = config.get("layer_types")
        slides = types[layer.index] != full if types else default(layer)
        return (_window if slides else _full)(config, layer)

    return rule


def _llama(config: Mapping[str, Any], layer: LayerFacts) -> KvRule:
    types = config.get("layer_types") or ["full_attention"] * layer.count
    slides = types[layer.index] == "sliding_attention"
    return (_window if slides else _full)(config, layer)


def _by_pattern(usual: int) -> Rule:
    """Full attention in every n-th layer, a window in all others."""

    def rule(config: Mapping[str, Any], layer: LayerFacts) -> KvRule:
        every = int(config.get("sliding_window_pattern") or usual)
        return (_full if layer.index % every == every - 1 else _window)(config, layer)

    return rule


def _latent(config: Mapping[str, Any], layer: LayerFacts) -> KvRule:
    width = int(config["kv_lora_rank"]) + int(config["qk_rope_head_dim"])
    return KvRule(bytes_per_token=width * layer.element_bytes)


def _expanded(config: Mapping[str, Any], layer: LayerFacts) -> KvRule:
    # mlx-lm's DeepSeek V2 caches every head's keys and values, not the latent they come from.
    head = int(config["qk_nope_head_dim"]) + int(config["qk_rope_head_dim"]) + int(config["v_head_dim"])
    return KvRule(bytes_per_token=int(config["num_attention_heads"]) * head * layer.element_bytes)


def _gated_delta(config: Mapping[str, Any], layer: LayerFacts) -> KvRule:
    if (layer.index + 1) % int(config.get("full_attention_interval") or 4) == 0:
        return _full(config, layer)
    key_width = int(config["linear_num_key_heads"]) * int(config["linear_key_head_dim"])
    value_width = int(config["linear_num_value_heads"]) * int(config["linear_value_head_dim"])
    conv_steps = int(config["linear_conv_kernel_dim"]) - 1
    # This state and Mamba 2's are float32 whatever the model's type.
    state_bytes = value_width * int(config["linear_key_head_dim"]) * 4
    return KvRule(constant_bytes=conv_steps * (2 * key_width + value_width) * layer.element_bytes + state_bytes)


def _mamba(config: Mapping[str, Any], layer: LayerFacts) -> KvRule:
    width, state = int(config["intermediate_size"]), int(config.get("state_size") or config["ssm_state_size"])
    conv_steps = int(config["conv_kernel"]) - 1
    return KvRule(constant_bytes=width * (conv_steps * layer.element_bytes + state * layer.state_bytes))


def _mamba2(config: Mapping[str, Any], layer: LayerFacts) -> KvRule:
    width, state = int(config["num_heads"]) * int(config["head_dim"]), int(config["state_size"])
    conv_steps = (int(config["conv_kernel"]) - 1) * (width + 2 * int(config["n_groups"]) * state)
    return KvRule(constant_bytes=conv_steps * layer.element_bytes + width * state * 4)


def _short_convolution(config: Mapping[str, Any], layer: LayerFacts) -> KvRule:
    full = config.get("full_attn_idxs")
    if full is None:
        full = [i for i, kind in enumerate(config["layer_types"]) if kind == "full_attention"]
    if layer.index in full:
        return _full(config, layer)
    return KvRule(constant_bytes=(int(config["conv_L_cache"]) - 1) * int(config["hidden_size"]) * layer.element_bytes)


_DENSE = [
    "cohere",
    "ernie4_5",
    "gemma",
    "gemma2",
    "glm4",
    "glm4_moe",
    "granite",
    "granitemoe",
    "helium",
    "internlm3",
    "mixtral",
    "olmo2",
    "olmoe",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "starcoder2",
]

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_DENSE, _full),
    "llama": _llama,
    "ministral3": _llama,
    "gemma3": _by_pattern(6),
    "gemma3_text": _by_pattern(6),
    "cohere2": _by_pattern(4),
    "gpt_oss": _by_layer_types("full_attention", lambda layer: layer.index % 2 == 0),
    "olmo3": _by_layer_types("full_attention", lambda layer: (layer.index + 1) % 4 != 0),
    "deepseek_v2": _expanded,
    "deepseek_v3": _latent,
    "glm4_moe_lite": _latent,
    "qwen3_next": _gated_delta,
    "qwen3_5": _gated_delta,
    "qwen3_5_moe": _gated_delta,
    "mamba": _mamba,
    "mamba2": _mamba2,
    "lfm2": _short_convolution,
    "lfm2_moe": _short_convolution,
}
"""Rules by mlx-lm's module."""

LATENT = frozenset(name for name, rule in RULES.items() if rule is _latent)
"""Modules with multi-head latent attention: each chunk of a prompt expands the cached latent."""


def module_of(model_type: str) -> str:
    """Return mlx-lm's module for a config's `model_type`."""
    return _NAMED_IN_MLX_LM.get(model_type, model_type)


def kv_rule(module: str, config: Mapping[str, Any], layer: LayerFacts) -> KvRule | None:
    """Return a layer's rule; None if there is no rule, or the config lacks what it needs."""
    rule = RULES.get(module)
    try:
        return None if rule is None else rule(config, layer)
    except (KeyError, IndexError, TypeError, ValueError):
        return None
