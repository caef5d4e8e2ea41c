"""Which models can be cut into stages: those that compute embed_tokens, layers(x, mask, cache), norm, head.

Keys are mlx-lm's module names, after its own remapping of `model_type` (mistral is llama). A test builds each one
here and compares its stages with the whole. Others scale the embedding, cap logits, or carry state from layer to
layer beside the hidden state (gemma, deepseek, qwen3_next …): cut the same way they would answer wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal_inference.stage.errors import LoadFailed, UnsupportedArchitecture

SUPPORTED: Mapping[str, str] = {
    "llama": "Llama 2 and 3, Mistral 7B, SmolLM 2; per-layer sliding windows included",
    "mixtral": "Mixtral",
    "olmo2": "OLMo 2",
    "phi3": "Phi 3 and 4 mini",
    "qwen2": "Qwen 2 and 2.5",
    "qwen2_moe": "Qwen 1.5 and 2 MoE",
    "qwen3": "Qwen 3, dense",
    "qwen3_moe": "Qwen 3 MoE",
    "smollm3": "SmolLM 3",
}


def resolve(config: Mapping[str, Any], remapping: Mapping[str, str]) -> str:
    """mlx-lm's module for a config.json; raises unless it is in the table."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise LoadFailed(
            "config.json has no model_type: the model's files are incomplete, run `shoal storage repair`"
        )
    module = remapping.get(model_type, model_type)
    if module not in SUPPORTED:
        raise UnsupportedArchitecture(
            f"models of type {model_type!r} are not supported; supported: {', '.join(sorted(SUPPORTED))}"
        )
    return module


def context_tokens(asked: int, config: Mapping[str, Any]) -> int:
    """Tokens of context: what was asked, or the model's own limit for 0."""
    if asked > 0:
        return asked
    own = config.get("max_position_embeddings")
    if not isinstance(own, int) or own <= 0:
        raise LoadFailed("config.json has no max_position_embeddings: run the model with context_tokens set")
    return own
