"""Predicted memory against what MLX reports: weights and caches within 1 %, the peak within 10 %."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm import utils

from shoal_common.models.model_shape import read_model_shape
from shoal_inference.stage.ipc.blas import child_environment
from shoal_inference.stage.ipc.messages import Start
from shoal_placement.planning.memory_model import (
    PREFILL_CHUNK_TOKENS,
    STAGE_OVERHEAD_BYTES,
    cached_tokens,
    model_need,
)
from shoal_placement.solver import slice_bytes
from tests.harness.process import checked_run
from tests.inference.service.conftest import ROOT

TOKENS = 1025
"""Two full chunks, the second of which sees the first, and one more token."""
CHUNK = 512
WEIGH_S = 600.0

COMMON: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 128},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 512,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 8,
        "kv_lora_rank": 128,
        "q_lora_rank": 192,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 512,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
    },
    "deepseek_v2": {
        "model_type": "deepseek_v2",
        "num_key_value_heads": 8,
        "kv_lora_rank": 128,
        "q_lora_rank": 192,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "rope_scaling": {"type": "yarn", "factor": 1.0, "original_max_position_embeddings": 2048},
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        "sliding_window": 256,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 64,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "num_hidden_layers": 4,
        "sliding_window": 128,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 512,
    },
    "llama-windows": {
        "model_type": "llama",
        "sliding_window": 256,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    },
    "llama-4bit": {"model_type": "llama"},
}


SAMPLE = ("llama", "qwen3_moe", "deepseek_v3", "gemma3_text")
"""One of each kind of weights and caches; the others are measured by `make test-long AREA=inference`."""


def write(directory: Path, name: str) -> Path:
    """Write a random model in the hub's format."""
    config = {**COMMON, **MODELS[name]}
    model_class, args_class = utils._get_classes(config)
    model = model_class(args_class.from_dict(config))
    if name.endswith("4bit"):
        model, config = utils.quantize_model(model, config, group_size=64, bits=4)
    directory.mkdir()
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def weighed(directory: Path) -> dict[str, int]:
    """Return the measurement of `weighing`."""
    paths = [str(ROOT), *(str(ROOT / p) for p in ("libs/common", "services/inference", "services/placement"))]
    command = [sys.executable, "-m", "tests.inference.cache_memory_probe", str(directory), str(TOKENS), str(CHUNK)]
    environment = {**child_environment({"PYTHONPATH": ":".join(paths)}), "HF_HUB_OFFLINE": "1"}
    ran = checked_run(*command, timeout_s=WEIGH_S, environment=environment)
    found: dict[str, int] = json.loads(ran.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    "name", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.long) for name in MODELS]
)
def test_predicted_memory_is_what_mlx_reports(name: str, tmp_path: Path) -> None:
    directory = write(tmp_path / name, name)
    shape = read_model_shape(directory)
    assert not shape.estimated
    found = weighed(directory)
    head_bytes = shape.head_bytes - (shape.embed_bytes if shape.tied else 0)
    weight_bytes = sum(shape.layer_bytes) + shape.embed_bytes + head_bytes
    kept = [r.bytes_per_token * cached_tokens(r, TOKENS) + r.constant_bytes for r in shape.kv_rules]
    answering_bytes = weight_bytes + sum(kept)
    need = model_need(shape, TOKENS, requests=1, fused=False, chunk_tokens=CHUNK)
    peak_bytes = slice_bytes(need, 0, len(need.layer_bytes)) - STAGE_OVERHEAD_BYTES
    ratios = {
        "weights": found["weight_bytes"] / weight_bytes,
        "with caches": found["answering_bytes"] / answering_bytes,
        "peak": found["peak_bytes"] / peak_bytes,
    }
    print(name, {k: round(v, 4) for k, v in ratios.items()}, found["peak_bytes"] - found["weight_bytes"])
    assert abs(ratios["weights"] - 1) < 0.01, ratios
    assert abs(ratios["with caches"] - 1) < 0.01, ratios
    assert abs(ratios["peak"] - 1) < 0.10, ratios


def test_placement_counts_with_the_chunks_that_stages_compute() -> None:
    fields = dict(
        zip(Start.__struct_fields__[-len(Start.__struct_defaults__) :], Start.__struct_defaults__, strict=True)
    )
    assert fields["prefill_chunk_tokens"] == PREFILL_CHUNK_TOKENS
