"""Each architecture's KV rule matches the size of mlx-lm's own caches, layer by layer."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm import utils
from mlx_lm.models import cache as _untyped_cache

from shoal_common.messages.model_shape import KvRule, ModelShape
from shoal_common.models.kv_cache import RULES, module_of
from shoal_common.models.model_shape import parse_model_shape
from shoal_common.models.safetensors_header import Tensor
from shoal_placement.planning.memory_model import cached_tokens, max_cached_tokens

cache: Any = _untyped_cache

LAYERS = 4
WINDOW = 64
CHUNK = 128
TOKENS = 301
_DTYPES = {mx.float32: "F32", mx.bfloat16: "BF16"}

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "norm_epsilon": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "rope_theta": 10000.0,
    "rope_dim": 16,
    "tie_word_embeddings": False,
    "use_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bias": False,
    "qkv_bias": False,
    "partial_rotary_factor": 0.5,
    "use_qk_norm": True,
    "sliding_window": WINDOW,
    # Mixture of experts, with all names of the fields.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.0,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_dense_layers": 1,
    "use_expert_bias": True,
    # Latent attention.
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    # State-space layers.
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "state_size": 8,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "time_step_rank": 4,
    "time_step_limit": [0.0, 1e6],
    "n_groups": 1,
    "conv_L_cache": 3,
    "conv_bias": False,
    "block_dim": 64,
    "block_ff_dim": 96,
    "block_multiple_of": 8,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    # Multipliers.
    "embedding_multiplier": 1.0,
    "attention_multiplier": 0.1,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "query_pre_attn_scalar": 16,
    "logit_scale": 1.0,
}
OWN: dict[str, dict[str, Any]] = {
    "llama": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "ministral3": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "rope_theta": 1e4,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 512,
        },
    },
    "gemma3_text": {"sliding_window_pattern": 2},
    "gemma3": {"text_config": {**COMMON, "model_type": "gemma3_text", "sliding_window_pattern": 3}},
    "cohere2": {"sliding_window_pattern": 2},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "conv"]},
    "mamba2": {"num_heads": 4, "intermediate_size": 64},
    "deepseek_v2": {"rope_scaling": {"type": "yarn", "factor": 1.0, "original_max_position_embeddings": 512}},
    "glm4_moe": {"rope_scaling": None},
    "qwen3_5": {"text_config": {**COMMON, "model_type": "qwen3_5_text"}},
    "qwen3_5_moe": {"text_config": {**COMMON, "model_type": "qwen3_5_moe_text"}},
    "ernie4_5": {"rope_scaling": None},
}


def shape_and_caches(config: dict[str, Any], dtype: mx.Dtype) -> tuple[ModelShape, list[Any], list[int]]:
    """Return the shape by config and headers, the caches after a prompt and a token, and their peak sizes."""
    model_class, args_class = utils._get_classes(config)
    model = model_class(args_class.from_dict(config))
    model.update(tree_map(lambda p: p.astype(dtype) if p.dtype == mx.float32 else p, model.parameters()))
    parameters: Any = tree_flatten(model.parameters())
    tensors = {
        name: Tensor(0, p.nbytes, _DTYPES.get(p.dtype, "U32"), p.shape[0] if p.ndim else 0) for name, p in parameters
    }
    caches = cache.make_prompt_cache(model)
    most = [0] * len(caches)
    for at in range(0, TOKENS - 1, CHUNK):
        mx.eval(model(mx.ones((1, min(CHUNK, TOKENS - 1 - at)), mx.int32), cache=caches))
        most = [max(before, weight(c)) for before, c in zip(most, caches, strict=True)]
    mx.eval(model(mx.ones((1, 1), mx.int32), cache=caches))
    return parse_model_shape(config, tensors), caches, most


def weight(layer_cache: Any) -> int:
    """Return the bytes of a layer's cache."""
    return int(layer_cache.nbytes)


def named(module: str) -> dict[str, Any]:
    return {**COMMON, "model_type": module, **OWN.get(module, {})}


@pytest.mark.parametrize("module", sorted(RULES))
def test_a_known_rule_is_what_the_caches_weigh(module: str) -> None:
    # MLX's CPU build multiplies gathered experts in float32 only.
    experts = any(word in module for word in ("moe", "mixtral", "deepseek", "gpt_oss", "qwen3_next", "qwen3_5"))
    shape, caches, prefilled = shape_and_caches(named(module), mx.float32 if experts else mx.bfloat16)
    assert not shape.estimated
    kept = [r.bytes_per_token * cached_tokens(r, TOKENS) + r.constant_bytes for r in shape.kv_rules]
    assert [weight(c) for c in caches] == kept
    for before, rule in zip(prefilled, shape.kv_rules, strict=True):
        most = rule.bytes_per_token * max_cached_tokens(rule, TOKENS, CHUNK) + rule.constant_bytes
        assert before <= most
        if rule.window_tokens:
            assert before == most  # a chunk in addition to the window, until the first token of the answer


def test_windows_are_only_where_mlx_lm_has_them() -> None:
    shape, _, _ = shape_and_caches(named("gemma3_text"), mx.bfloat16)
    assert [r.window_tokens for r in shape.kv_rules] == [WINDOW, 0, WINDOW, 0]
    # Mistral's config has a window but mlx-lm keeps everything: what is kept counts.
    config = {**COMMON, "model_type": "mistral", "sliding_window": WINDOW}
    shape, caches, _ = shape_and_caches(config, mx.bfloat16)
    assert [r.window_tokens for r in shape.kv_rules] == [0] * LAYERS
    assert {type(c).__name__ for c in caches} == {"KVCache"}


@pytest.mark.parametrize("module", ["jamba_of_tomorrow", "gemma3n"])
def test_an_unknown_architecture_gets_an_upper_bound_estimate(module: str) -> None:
    config = {**COMMON, "model_type": module}
    tensors = {f"model.layers.{i}.self_attn.q_proj.weight": Tensor(0, 64) for i in range(LAYERS)}
    # The files take precedence over the config: one layer's keys are wider.
    tensors["model.layers.2.self_attn.k_proj.weight"] = Tensor(0, 64, "BF16", 200)
    shape = parse_model_shape(config, tensors)
    assert shape.estimated
    assert shape.kv_rules == [KvRule(bytes_per_token=200 * 2)] * LAYERS


def test_a_config_that_lacks_what_its_rule_needs_is_estimated() -> None:
    config = {k: v for k, v in named("qwen3_next").items() if k != "linear_key_head_dim"}
    tensors = {f"model.layers.{i}.self_attn.q_proj.weight": Tensor(0, 64) for i in range(LAYERS)}
    assert parse_model_shape(config, tensors).estimated


def test_names_of_mlx_lm_are_remapped_as_it_does() -> None:
    for model_type in ("mistral", "falcon_mamba", "kimi_k2", "joyai_llm_flash", "xverse", "iquestcoder"):
        assert module_of(model_type) == utils.MODEL_REMAPPING[model_type]
