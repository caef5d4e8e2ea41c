"""What shows that a model of a library is whole: its index, its shards' names, its weights' headers."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.storage.library_fixtures import cached, config, plain, safetensors
from tests.storage.unit.test_library_recognition import COMMIT, only, refusal, scan_library

INDEX = "model.safetensors.index.json"
WHOLE = safetensors(b"w" * 900)


def index_of(*files: str) -> bytes:
    return json.dumps({"weight_map": {f"t{i}": f for i, f in enumerate(files)}}).encode()


@pytest.mark.parametrize("weights", ["a.safetensors", "model.safetensors", "model-1.safetensors"])
@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (b'{"metadata": {"total_size": NaN}, "weight_map": {"t": "model-2.safetensors"}}', "cannot be read"),
        (b"\xef\xbb\xbf" + index_of("model-2.safetensors"), "model-2.safetensors, which"),
        (index_of("model-2.safetensors")[:-9], "cannot be read"),
        (index_of("model-2.safetensors").decode().encode("utf-16"), "cannot be read"),
        (b'{"weight_map": null}', "cannot be read"),
        (b'{"weight_map": {"t": 2}}', "cannot be read"),
        (b"{}", "cannot be read"),
        (b"[]", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_an_index_that_cannot_be_read_is_a_refusal(tmp_path: Path, weights: str, index: bytes, reason: str) -> None:
    files = {"config.json": config(), INDEX: index, weights: WHOLE}
    cached(tmp_path / "cache", "org/name", COMMIT, files)
    plain(tmp_path / "plain", "org/name", files)
    for directory in ("cache", "plain"):
        refused = refusal(scan_library(tmp_path / directory))
        assert INDEX in refused and reason in refused


def test_an_index_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    files = {
        "config.json": config(),
        INDEX: b"\xef\xbb\xbf" + index_of("model.safetensors"),
        "model.safetensors": WHOLE,
    }
    plain(tmp_path, "org/name", files)
    assert only(scan_library(tmp_path)).repo == "org/name"


def test_one_weight_file_of_several_is_no_model(tmp_path: Path) -> None:
    """As `hf download org/name model-00002-of-00003.safetensors` leaves a cache."""
    alone = {"model-00002-of-00003.safetensors": WHOLE}
    cached(tmp_path / "alone", "org/name", COMMIT, alone)
    assert "config.json is missing" in refusal(scan_library(tmp_path / "alone"))
    cached(tmp_path / "shards", "org/name", COMMIT, {**alone, "config.json": config()})
    assert "model-00001-of-00003.safetensors" in refusal(scan_library(tmp_path / "shards"))
    plain(tmp_path / "plain", "org/name", {**alone, "config.json": config()})
    assert "model-00001-of-00003.safetensors" in refusal(scan_library(tmp_path / "plain"))


@given(size_bytes=st.integers(0, len(WHOLE) - 1))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_truncated_weights_are_no_model(tmp_path: Path, size_bytes: int) -> None:
    root = tmp_path / str(size_bytes)
    plain(root, "org/name", {"config.json": config(), "model.safetensors": WHOLE[:size_bytes]})
    assert refusal(scan_library(root)).startswith("model.safetensors cannot be used: ")


@pytest.mark.parametrize("data", [bytes(900), b"<html>" * 90, struct.pack("<Q", 4) + b"[1]}" + bytes(9)])
def test_weights_without_a_header_are_no_model(tmp_path: Path, data: bytes) -> None:
    cached(tmp_path, "org/name", COMMIT, {"config.json": config(), "model.safetensors": data})
    assert "model.safetensors cannot be used" in refusal(scan_library(tmp_path))


def test_weights_that_are_whole_again_are_a_model(tmp_path: Path) -> None:
    directory = plain(tmp_path, "org/name", {"config.json": config(), "model.safetensors": WHOLE[:-1]})
    assert scan_library(tmp_path).candidates == []
    (directory / "model.safetensors").write_bytes(WHOLE)
    assert only(scan_library(tmp_path)).repo == "org/name"
