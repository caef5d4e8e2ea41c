"""A model's shape comes from its config and its files' headers; what cannot be read is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_common.errors import Corrupt, Unsupported
from shoal_common.models.model_shape import compute_model_shape, read_model_shape, tensor_bytes
from shoal_common.models.safetensors_header import Tensor

CONFIG = {
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}
TENSORS = {
    "model.embed_tokens.weight": 1000,
    "model.layers.0.self_attn.q_proj.weight": 100,
    "model.layers.0.mlp.up_proj.weight": 50,
    "model.layers.1.self_attn.q_proj.weight": 200,
    "model.norm.weight": 16,
}


def safetensors(tensors: dict[str, int]) -> bytes:
    """Return a file's header, as safetensors writes it, without the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    at = 0
    for name, size in tensors.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw


def model_in(directory: Path, config: object, *files: bytes) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    for number, data in enumerate(files):
        (directory / f"model-{number}.safetensors").write_bytes(data)
    return directory


def test_layers_embedding_head_and_cache_are_counted(tmp_path: Path) -> None:
    first = {k: v for k, v in TENSORS.items() if "layers.1" not in k}
    second = {k: v for k, v in TENSORS.items() if "layers.1" in k} | {"lm_head.weight": 900}
    shape = read_model_shape(model_in(tmp_path, CONFIG, safetensors(first), safetensors(second)))
    assert shape.layer_bytes == [150, 200]
    assert (shape.embed_bytes, shape.head_bytes, shape.tied) == (1000, 916, False)
    assert shape.kv_bytes_per_token_layer == 2 * 2 * 16 * 2
    assert (shape.context_tokens, shape.hidden_bytes, shape.architecture) == (512, 16, "qwen3")


def test_a_tied_head_counts_the_embedding_twice(tmp_path: Path) -> None:
    shape = read_model_shape(model_in(tmp_path, CONFIG, safetensors(TENSORS)))
    assert (shape.head_bytes, shape.tied) == (16 + 1000, True)


def test_a_text_config_within_a_larger_model_is_found() -> None:
    tensors = {name: Tensor(0, size) for name, size in TENSORS.items()}
    shape = compute_model_shape({"model_type": "vlm", "text_config": CONFIG}, tensors)
    assert len(shape.layer_bytes) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 0},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 10**12},
        {"hidden_size": None},
        {"num_attention_heads": 0},
    ],
)
def test_what_is_no_language_model_is_unsupported(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(Unsupported):
        read_model_shape(model_in(tmp_path, CONFIG | change, safetensors(TENSORS)))


@pytest.mark.parametrize(
    "config",
    [[], 7, "x", CONFIG | {"num_hidden_layers": "two"}, CONFIG | {"text_config": 5}, CONFIG | {"head_dim": [1]}],
)
def test_a_config_that_makes_no_sense_is_refused(tmp_path: Path, config: object) -> None:
    with pytest.raises((Corrupt, Unsupported)):
        read_model_shape(model_in(tmp_path, config, safetensors(TENSORS)))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"config\.json"):
        read_model_shape(tmp_path)
    with pytest.raises(Unsupported, match="safetensors"):
        read_model_shape(model_in(tmp_path, CONFIG))


WHOLE = safetensors(TENSORS)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 20, len(WHOLE) - 1])
def test_a_truncated_header_is_corrupt(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(WHOLE[:length])
    with pytest.raises(Corrupt, match=r"model\.safetensors"):
        tensor_bytes(path)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{}x",
        b'{"a": 1}',
        b'{"a": {}}',
        b'{"a": {"data_offsets": []}}',
        b'{"a": {"data_offsets": [5, 1]}}',
        b'{"a": {"data_offsets": [-5, 1]}}',
        b'{"a": {"data_offsets": ["0", "1"]}}',
        b'{"a": {"data_offsets": [0, NaN]}}',
        b'{"a": {"data_offsets": [0, 1.5]}}',
        b"[" * 100_000,
        b"\xff\xff",
    ],
)
def test_a_header_that_is_not_one_is_corrupt(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(Corrupt):
        tensor_bytes(path)


@given(data=st.binary(max_size=64), honest=st.booleans())
def test_garbage_is_corrupt_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, honest: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "garbage.safetensors"
    path.write_bytes((struct.pack("<Q", len(data)) if honest else b"") + data)
    try:
        assert all(size >= 0 for size in tensor_bytes(path).values())
    except Corrupt as e:
        assert "garbage" in e.message
