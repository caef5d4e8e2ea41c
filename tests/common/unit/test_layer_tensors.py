"""Which tensors a stage needs: the stages of any layout have all tensors together, and read no layer twice."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_common.errors import BadInput, Corrupt, Unsupported
from shoal_common.models.layer_tensors import StageTensors, check_layers, covers, union
from shoal_common.models.safetensors_header import header_end, parse_tensor_ranges

LAYERS = 6
NAMES = [
    "model.embed_tokens.weight",
    "model.embed_tokens.scales",
    *(f"model.layers.{n}.{part}.weight" for n in range(LAYERS) for part in ("self_attn.q_proj", "input_layernorm")),
    "model.norm.weight",
    "lm_head.weight",
]


def config(tied: bool | None) -> dict[str, object]:
    made: dict[str, object] = {"num_hidden_layers": LAYERS}
    return made if tied is None else {**made, "tie_word_embeddings": tied}


@given(st.sets(st.integers(1, LAYERS - 1)), st.sampled_from([True, False, None]))
def test_stages_of_any_layout_hold_every_tensor_once_but_ties(cuts: set[int], tied: bool | None) -> None:
    ends = [0, *sorted(cuts), LAYERS]
    stages = [StageTensors(config(tied), a, b) for a, b in itertools.pairwise(ends)]
    for name in NAMES:
        count = sum(stage.needs(name) for stage in stages)
        twice = "embed" in name and tied is not False and len(stages) > 1
        assert count == (2 if twice else 1), name
    assert stages[0].needs("model.embed_tokens.weight") and stages[-1].needs("lm_head.weight")


def test_an_unknown_tensor_goes_to_all_and_extra_layers_to_none() -> None:
    stage = StageTensors(config(False), 2, 4)
    assert stage.needs("model.something_new.weight")
    assert not stage.needs(f"model.layers.{LAYERS}.eh_proj.weight")


@pytest.mark.parametrize("layers", [(0, LAYERS + 1), (3, 3), (4, 2), (-1, 2)])
def test_layers_that_the_model_has_not_are_refused(layers: tuple[int, int]) -> None:
    with pytest.raises(Unsupported, match="the layout is for another model"):
        StageTensors(config(True), *layers)


@pytest.mark.parametrize("layers", [[0], [0, 1, 2], [2, 2], [3, 1], [-1, 2]])
def test_I10_layers_from_outside_that_make_no_sense_are_refused(layers: list[int]) -> None:
    with pytest.raises(BadInput):
        check_layers(layers)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)).map(lambda p: [p[0], p[0] + p[1]]), max_size=6))
def test_joined_layer_ranges_cover_the_same_layers(runs: list[list[int]]) -> None:
    joined = union(runs)
    assert {n for a, b in joined for n in range(a, b)} == {n for a, b in runs for n in range(a, b)}
    assert all(covers(joined, run) for run in runs)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(joined))


def test_tensors_follow_the_header_and_a_bad_header_is_corrupt() -> None:
    raw = b'{"a":{"data_offsets":[0,4]},"__metadata__":{}}'
    prefix = len(raw).to_bytes(8, "little")
    assert header_end(prefix, "x") == 8 + len(raw)
    assert parse_tensor_ranges(prefix + raw, "x") == {"a": (8 + len(raw), 12 + len(raw))}
    for bad in (b"", b"1234567", (1).to_bytes(8, "little"), (1 << 40).to_bytes(8, "little")):
        with pytest.raises(Corrupt):
            header_end(bad, "x")
