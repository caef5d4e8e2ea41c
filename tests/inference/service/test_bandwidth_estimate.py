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
    MAX_DEVIATION_FACTOR,
    MIN_SAMPLE_BYTES,
    MIN_SAMPLE_S,
    SIGNIFICANT_CHANGE,
    BandwidthEstimate,
    bytes_read_per_token,
    is_usable_sample,
)
from shoal_inference.host_facts.device import (
    detect_device,
    machine_fingerprint,
    read_cached_device,
    read_observed_bandwidth,
    save_observed_bandwidth,
)
from shoal_inference.stage.compute.device import Device
from shoal_inference.stage.ipc.messages import PassTiming
from shoal_inference.stage.requests.pass_timing import EVERY_S, LEAST_PASSES, MOST_PASSES, Passes
from tests.inference.service.conftest import Models, Rings, Run
from tests.inference.service.test_memory_facts import left_in

IDLE = 10e9
GIB = 1 << 30
speeds = st.floats(1e6, 1e13)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(1e-4, 60), st.floats(0, 3)), min_size=LEAST_PASSES, max_size=60))
def test_a_stage_sends_its_median_pass_only_while_it_works(seen: list[tuple[float, float]]) -> None:
    passes, now_s, sent_at_s = Passes(), 0.0, None
    since: list[float] = []
    for pass_s, pause_s in seen:
        now_s += pause_s
        since = [*since, pass_s][-MOST_PASSES:]
        sent = passes.note(pass_s, now_s)
        due = len(since) >= LEAST_PASSES and (sent_at_s is None or now_s - sent_at_s >= EVERY_S)
        assert (sent is not None) == due
        if sent is not None:
            assert sent == PassTiming(pass_s=median(since), passes=len(since))
            sent_at_s, since = now_s, []


@settings(max_examples=50)
@given(speeds, st.lists(st.tuples(st.integers(1, 1 << 40), st.floats(1e-6, 1e3)), max_size=30))
def test_a_nodes_bandwidth_is_bounded_and_published_on_a_change(idle: float, seen: list[tuple[int, float]]) -> None:
    kept: list[float] = []
    speed = BandwidthEstimate(kept.append)
    speed.start(idle, 0.0)
    published = [0.0]
    for pass_bytes, pass_s in seen:
        speed.add_sample(pass_bytes, pass_s)
        if speed.published_bytes_per_s != published[-1]:
            assert is_usable_sample(pass_bytes, idle)
            assert (
                abs(speed.published_bytes_per_s - (published[-1] or idle))
                > SIGNIFICANT_CHANGE * (published[-1] or idle) - 1
            )
            assert idle / MAX_DEVIATION_FACTOR - 1 <= speed.published_bytes_per_s <= idle * MAX_DEVIATION_FACTOR + 1
            published.append(speed.published_bytes_per_s)
    assert kept == published[1:]


@given(st.floats(IDLE / MAX_DEVIATION_FACTOR, IDLE * MAX_DEVIATION_FACTOR), st.floats(0.95, 1.05))
def test_a_steady_node_converges_to_its_bandwidth_and_is_quiet(true: float, waver: float) -> None:
    kept: list[float] = []
    speed = BandwidthEstimate(kept.append)
    speed.start(IDLE, 0.0)
    for _ in range(40):
        speed.add_sample(GIB, GIB / true)
    assert (speed.published_bytes_per_s or IDLE) == pytest.approx(true, rel=2 * SIGNIFICANT_CHANGE)
    before = len(kept)
    for step in range(40):
        speed.add_sample(GIB, GIB / (true * (waver if step % 2 else 1 / waver)))
    assert len(kept) - before <= 1


@given(st.integers(0, MIN_SAMPLE_BYTES - 1), st.floats(1e-9, 1e3), speeds)
def test_a_tiny_model_does_not_change_the_bandwidth(pass_bytes: int, pass_s: float, idle: float) -> None:
    speed = BandwidthEstimate(lambda _: pytest.fail("it was kept"))
    speed.start(idle, 0.0)
    speed.add_sample(pass_bytes, pass_s)
    assert speed.published_bytes_per_s == 0.0 and not is_usable_sample(int(MIN_SAMPLE_S * 800e9) - 1, 800e9)


@given(speeds)
def test_what_ran_corrects_what_was_never_measured(true: float) -> None:
    kept: list[float] = []
    speed = BandwidthEstimate(kept.append)
    speed.add_sample(GIB, GIB / true)
    assert kept == [], "a configured bandwidth is never corrected"
    speed.start(0.0, 0.0)
    speed.add_sample(GIB, GIB / true)
    assert speed.published_bytes_per_s == pytest.approx(true, rel=0.01)
    speed.start(true, 0.0)
    assert speed.published_bytes_per_s == pytest.approx(true, rel=0.01), (
        "the measurement of the idle machine keeps it"
    )


def test_the_first_stage_corrects_the_idle_measurement_at_once() -> None:
    speed = BandwidthEstimate(lambda _: None)
    speed.start(IDLE, 0.0)
    speed.add_sample(GIB, GIB / (IDLE / 3))
    assert speed.published_bytes_per_s == pytest.approx(IDLE / 3, rel=0.01)


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
    assert [bytes_read_per_token(shape, *run) for run in ((0, 1), (1, 3), (0, 3))] == [100, 511, 611]
    mixed = ModelShape(**{**{f: getattr(shape, f) for f in shape.__struct_fields__}, "layer_active_bytes": [1, 2, 3]})
    assert [bytes_read_per_token(mixed, *run) for run in ((0, 1), (1, 3))] == [1, 16]


async def test_measured_bandwidth_survives_a_restart_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_observed_bandwidth(tmp_path, 5e9)
    assert not left_in(tmp_path), "beside no measurement nothing is kept"
    measured = Device(accelerator="cpu", bytes_per_s=IDLE)
    device.save_device(tmp_path, machine_fingerprint(), measured)
    assert read_observed_bandwidth(tmp_path) == 0.0
    save_observed_bandwidth(tmp_path, 5e9)
    assert (
        read_observed_bandwidth(tmp_path) == 5e9 and read_cached_device(tmp_path, machine_fingerprint()) == measured
    )
    assert (await detect_device(tmp_path, None)).bytes_per_s == IDLE
    assert read_observed_bandwidth(tmp_path) == 5e9, "a start that measures nothing leaves it"
    monkeypatch.setattr(device, "machine_fingerprint", lambda: "another machine")
    assert read_observed_bandwidth(tmp_path) == 0.0


def test_each_stage_of_a_real_ring_reports_its_pass_time(own_ring: Rings, models: Models, run: Run[None]) -> None:
    ring = own_ring(models("llama"), (0, 3, 6))

    async def reported() -> None:
        for child in ring.children:
            assert not [e for e in child.events if isinstance(e, PassTiming)]
        tokens = 0
        while tokens <= LEAST_PASSES:  # a random model may end an answer early
            tokens += len(await ring.generate((3, 14, 15), 2 * LEAST_PASSES, temperature=1.0, seed=tokens))
        for child in ring.children:
            timing = await child.wait(PassTiming)
            assert timing.passes >= LEAST_PASSES and 0 < timing.pass_s < 60

    run(reported())
