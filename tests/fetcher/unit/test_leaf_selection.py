"""The leaves that stages need: every byte of every needed tensor, and no leaf without one."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_common.errors import Corrupt
from shoal_common.messages.manifest import Manifest, ManifestFile
from shoal_common.models.layer_tensors import StageTensors
from shoal_common.models.safetensors_header import parse_tensor_ranges
from shoal_common.store import leaf_set
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_fetcher.sources.leaf_selection import MAX_SMALL_FILE_BYTES, first_leaves, header_leaves, stage_leaves

LAYERS = 4
NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{n}.{part}.weight" for n in range(LAYERS) for part in ("q_proj", "norm")),
    "model.norm.weight",
    "lm_head.weight",
]
CONFIG = {"num_hidden_layers": LAYERS, "tie_word_embeddings": False}
BLOB = "a" * 64


def header(sizes: Mapping[str, int]) -> bytes:
    """Return a safetensors file up to the header's end, for tensors of these sizes in this order."""
    at, entries = 0, {}
    for name, size in sizes.items():
        entries[name] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(entries).encode()
    return len(raw).to_bytes(8, "little") + raw


@st.composite
def files(draw: st.DrawFn) -> tuple[bytes, int]:
    """Return the header of a file with a model's tensors in any order, and the file's size."""
    names = draw(st.permutations(NAMES))
    sizes = {
        name: draw(st.sampled_from([0, 1, 700, LEAF_BYTES - 1, LEAF_BYTES, 3 * LEAF_BYTES + 5])) for name in names
    }
    head = header(sizes)
    return head, len(head) + sum(sizes.values())


RUNS = st.tuples(st.integers(0, LAYERS - 1), st.integers(1, LAYERS)).map(lambda p: [p[0], min(p[0] + p[1], LAYERS)])


@given(files(), st.lists(RUNS, min_size=1, max_size=3))
def test_needed_leaves_cover_every_byte_of_the_needed_tensors(
    made: tuple[bytes, int], layers: list[list[int]]
) -> None:
    head, size_bytes = made
    file = ManifestFile(path="model.safetensors", size_bytes=size_bytes, sha256=BLOB)
    leaves = stage_leaves(CONFIG, {BLOB: head}, [file], layers)[BLOB]
    stages = [StageTensors(CONFIG, first, last) for first, last in layers]
    needed = [(0, len(head))]
    needed += [r for n, r in parse_tensor_ranges(head, "x").items() if any(s.needs(n) for s in stages)]
    touched = {leaf for a, b in needed if a < b for leaf in range(a // LEAF_BYTES, (b - 1) // LEAF_BYTES + 1)}
    assert {leaf for a, b in leaf_set.to_ranges(leaves) for leaf in range(a, b)} == touched


@given(files(), RUNS, RUNS)
def test_what_two_stages_need_together_is_what_each_needs(
    made: tuple[bytes, int], one: list[int], other: list[int]
) -> None:
    head, size_bytes = made
    file = ManifestFile(path="model.safetensors", size_bytes=size_bytes, sha256=BLOB)

    def needed(*layers: list[int]) -> int:
        return stage_leaves(CONFIG, {BLOB: head}, [file], layers)[BLOB]

    assert needed(one, other) == needed(one) | needed(other)


@given(files())
def test_a_stage_of_all_layers_needs_all_leaves(made: tuple[bytes, int]) -> None:
    head, size_bytes = made
    file = ManifestFile(path="model.safetensors", size_bytes=size_bytes, sha256=BLOB)
    assert stage_leaves(CONFIG, {BLOB: head}, [file], [[0, LAYERS]])[BLOB] == leaf_set.all_leaves(size_bytes)


def test_at_first_small_files_and_weight_headers_are_needed() -> None:
    sizes = {
        "config.json": 900,
        "tokenizer.json": MAX_SMALL_FILE_BYTES,
        "model-00001-of-00002.safetensors": 5 * LEAF_BYTES,
        "model-00002-of-00002.safetensors": 300,
        "consolidated.safetensors": MAX_SMALL_FILE_BYTES + 1,
        "original/model.safetensors": 400,
    }
    manifest = Manifest(
        repo="org/name",
        commit="c" * 40,
        files=[ManifestFile(path=p, size_bytes=s, sha256=f"{i:064x}") for i, (p, s) in enumerate(sizes.items())],
    )
    assert first_leaves(manifest) == {f"{2:064x}": 1, f"{3:064x}": 1, f"{4:064x}": 0}


@pytest.mark.parametrize("size_bytes", [10, LEAF_BYTES])
def test_I1_a_header_or_tensor_past_its_files_end_is_corrupt(size_bytes: int) -> None:
    file = ManifestFile(path="model.safetensors", size_bytes=size_bytes, sha256=BLOB)
    with pytest.raises(Corrupt):
        header_leaves(size_bytes + 1, file)
    head = header({"model.norm.weight": 2 * LEAF_BYTES})
    with pytest.raises(Corrupt):
        stage_leaves(CONFIG, {BLOB: head}, [file], [[0, 1]])
