"""The bandwidth estimate from working stages: when it is published, which passes count, and how slowly it follows."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal_common.messages.model_shape import ModelShape
from shoal_inference.host_facts import device
from shoal_inference.host_facts.bandwidth_estimate import (
    FARTHEST,
    LEAST_BYTES,
    LEAST_S,
    NEWS_SHARE,
    Speed,
    counts,
    read_bytes,
)
from shoal_inference.host_facts.device import find_device, keep_working, read_kept, read_working, this_machine
from shoal_inference.stage.compute.device import Device
from shoal_inference.stage.ipc.messages import Pace
from shoal_inference.stage.requests.pass_timing import EVERY_S, LEAST_PASSES, MOST_PASSES, Passes
from tests.inference.conftest import Models, Rings, Run
from tests.inference.test_memory_facts import left_in

IDLE = 10e9
GIB = 1 << 30
speeds = st.floats(1e6, 1e13)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(1e-4, 60), st.floats(0, 3)), min_size=LEAST_PASSES, max_size=60))
def test_a_stage_sends_its_median_pass_only_while_it_works(seen: list[tuple[float, float]]) -> None:
    passes, now_s, told_at_s = Passes(), 0.0, None
    since: list[float] = []
    for pass_s, pause_s in seen:
        now_s += pause_s
        since = [*since, pass_s][-MOST_PASSES:]
        told = passes.note(pass_s, now_s)
        due = len(since) >= LEAST_PASSES and (told_at_s is None or now_s - told_at_s >= EVERY_S)
        assert (told is not None) == due
        if told is not None:
            assert told == Pace(pass_s=median(since), passes=len(since))
            told_at_s, since = now_s, []


@settings(max_examples=50)
@given(speeds, st.lists(st.tuples(st.integers(1, 1 << 40), st.floats(1e-6, 1e3)), max_size=30))
def test_a_nodes_bandwidth_is_bounded_and_published_on_a_change(idle: float, seen: list[tuple[int, float]]) -> None:
    kept: list[float] = []
    speed = Speed(kept.append)
    speed.begin(idle, 0.0)
    said = [0.0]
    for pass_bytes, pass_s in seen:
        speed.note(pass_bytes, pass_s)
        if speed.said != said[-1]:
            assert counts(pass_bytes, idle)
            assert abs(speed.said - (said[-1] or idle)) > NEWS_SHARE * (said[-1] or idle) - 1
            assert idle / FARTHEST - 1 <= speed.said <= idle * FARTHEST + 1
            said.append(speed.said)
    assert kept == said[1:]


@given(st.floats(IDLE / FARTHEST, IDLE * FARTHEST), st.floats(0.95, 1.05))
def test_a_steady_node_converges_to_its_bandwidth_and_is_quiet(true: float, waver: float) -> None:
    kept: list[float] = []
    speed = Speed(kept.append)
    speed.begin(IDLE, 0.0)
    for _ in range(40):
        speed.note(GIB, GIB / true)
    assert (speed.said or IDLE) == pytest.approx(true, rel=2 * NEWS_SHARE)
    before = len(kept)
    for step in range(40):
        speed.note(GIB, GIB / (true * (waver if step % 2 else 1 / waver)))
    assert len(kept) - before <= 1


@given(st.integers(0, LEAST_BYTES - 1), st.floats(1e-9, 1e3), speeds)
def test_a_tiny_model_does_not_change_the_bandwidth(pass_bytes: int, pass_s: float, idle: float) -> None:
    speed = Speed(lambda _: pytest.fail("it was kept"))
    speed.begin(idle, 0.0)
    speed.note(pass_bytes, pass_s)
    assert speed.said == 0.0 and not counts(int(LEAST_S * 800e9) - 1, 800e9) and not counts(GIB, 0.0)


def test_a_pass_reads_active_layers_and_the_head_on_the_last() -> None:
    shape = ModelShape(
        architecture="qwen3",
        layer_bytes=[100, 200, 300],
        embed_bytes=7,
        head_bytes=11,
        kv_bytes_per_token_layer=1,
        context_tokens=1,
        hidden_bytes=1,
    )
    assert [read_bytes(shape, *run) for run in ((0, 1), (1, 3), (0, 3))] == [100, 511, 611]
    mixed = ModelShape(**{**{f: getattr(shape, f) for f in shape.__struct_fields__}, "layer_active_bytes": [1, 2, 3]})
    assert [read_bytes(mixed, *run) for run in ((0, 1), (1, 3))] == [1, 16]


async def test_measured_bandwidth_survives_a_restart_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_working(tmp_path, 5e9)
    assert not left_in(tmp_path), "beside no measurement nothing is kept"
    measured = Device(accelerator="cpu", bytes_per_s=IDLE)
    device.keep(tmp_path, this_machine(), measured)
    assert read_working(tmp_path) == 0.0
    keep_working(tmp_path, 5e9)
    assert read_working(tmp_path) == 5e9 and read_kept(tmp_path, this_machine()) == measured
    assert (await find_device(tmp_path, None)).bytes_per_s == IDLE
    assert read_working(tmp_path) == 5e9, "a start that measures nothing leaves it"
    monkeypatch.setattr(device, "this_machine", lambda: "another machine")
    assert read_working(tmp_path) == 0.0


def test_each_stage_of_a_real_ring_reports_its_pass_time(own_ring: Rings, models: Models, run: Run[None]) -> None:
    ring = own_ring(models("llama"), (0, 3, 6))

    async def reported() -> None:
        for child in ring.children:
            assert not [e for e in child.events if isinstance(e, Pace)]
        tokens = 0
        while tokens <= LEAST_PASSES:  # a random model may end an answer early
            tokens += len(await ring.generate("the shoal turns", 2 * LEAST_PASSES, temperature=1.0, seed=tokens))
        for child in ring.children:
            pace = await child.wait(Pace)
            assert pace.passes >= LEAST_PASSES and 0 < pace.pass_s < 60

    run(reported())
