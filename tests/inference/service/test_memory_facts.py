"""The facts that placement uses: a machine's memory, what its stages occupy, and its memory bandwidth."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from shoal_common.host.cgroup import AvailableMemory, MemoryLimit
from shoal_common.messages.liveness import NodeFacts
from shoal_inference.host_facts import device
from shoal_inference.host_facts.device import (
    detect_device,
    machine_fingerprint,
    read_cached_device,
)
from shoal_inference.host_facts.memory import debounce_facts, memory_facts, occupied_bytes
from shoal_inference.host_facts.memory_pressure import parse_psi, pressure_level
from shoal_inference.stage.compute.device import Device
from tests.inference.service.conftest import ROOT

MIB = 1 << 20
CPU = Device(accelerator="cpu")
HERE = AvailableMemory().read()


def left_in(directory: Path) -> list[Path]:
    return list(directory.iterdir())


def test_a_memory_cap_limits_the_facts() -> None:
    facts = memory_facts(HERE, 5 * MIB, {}, CPU)
    assert (facts.memory_total_bytes, facts.memory_available_bytes) == (5 * MIB, 5 * MIB)
    assert memory_facts(HERE, None, {}, CPU).memory_total_bytes > 5 * MIB


def test_what_stages_occupy_is_not_available_under_a_cap_either() -> None:
    facts = memory_facts(HERE, 50 * MIB, {"i/0": 20 * MIB, "j/1": 10 * MIB}, CPU)
    assert (facts.memory_total_bytes, facts.memory_available_bytes) == (50 * MIB, 20 * MIB)
    assert facts.stages == {"i/0": 20 * MIB, "j/1": 10 * MIB}
    assert memory_facts(HERE, 50 * MIB, {"i/0": 80 * MIB}, CPU).memory_available_bytes == 0


def test_a_control_group_limits_facts_less_what_stages_occupy() -> None:
    machine = MemoryLimit(1000 * MIB, 900 * MIB, 700 * MIB)
    groups = [
        MemoryLimit(300 * MIB, 200 * MIB, 120 * MIB, Path("/g")),
        MemoryLimit(400 * MIB, 150 * MIB, 140 * MIB, Path("/")),
    ]
    facts = memory_facts([machine, *groups], None, {"i/0": 50 * MIB}, CPU)
    assert (facts.memory_total_bytes, facts.memory_available_bytes) == (300 * MIB, 150 * MIB)
    assert facts.memory_reclaimable_bytes == 30 * MIB
    facts = memory_facts([machine, *groups], 100 * MIB, {"i/0": 50 * MIB}, CPU)
    assert (facts.memory_total_bytes, facts.memory_available_bytes) == (100 * MIB, 50 * MIB)


def test_a_process_occupies_what_it_wrote_and_nothing_once_ended() -> None:
    program = "held = bytearray(b'x') * (128 << 20); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert 128 * MIB <= occupied_bytes(process.pid) < 256 * MIB
        process.communicate("\n")
    assert occupied_bytes(process.pid) == 0


# Debouncing

FACTS = NodeFacts(
    memory_total_bytes=16 << 30,
    memory_available_bytes=8 << 30,
    memory_reclaimable_bytes=1 << 30,
    stages={"i/0": 1 << 30},
    memory_pressure=0,
    accelerator="cpu",
)
_STEP = (16 << 30) // 100
WAVER = st.integers(-_STEP, _STEP)


@given(WAVER, WAVER, WAVER)
def test_facts_that_only_fluctuate_are_not_published_again(available: int, reclaimable: int, stage: int) -> None:
    now = structs.replace(
        FACTS,
        memory_available_bytes=FACTS.memory_available_bytes + available,
        memory_reclaimable_bytes=FACTS.memory_reclaimable_bytes + reclaimable,
        stages={"i/0": FACTS.stages["i/0"] + stage},
    )
    assert debounce_facts(FACTS, now) is FACTS


@given(st.integers(_STEP + 1, 4 << 30), WAVER)
def test_a_loaded_stage_is_published_with_the_memory_it_took(loaded: int, waver: int) -> None:
    now = structs.replace(
        FACTS,
        memory_available_bytes=FACTS.memory_available_bytes - loaded + waver,
        stages={"i/0": FACTS.stages["i/0"] + loaded},
    )
    assert debounce_facts(FACTS, now) is now


@pytest.mark.parametrize(
    "change",
    [
        {"stages": {}},
        {"stages": {"i/0": 1 << 30, "j/0": 0}},
        {"memory_pressure": 1},
        {"memory_pressure": None},
        {"idle_bandwidth_bytes_per_s": 1e9},
        {"accelerator_bytes": 1},
        {"memory_total_bytes": 8 << 30},
    ],
)
def test_a_change_of_a_stable_fact_is_published(change: dict[str, object]) -> None:
    now = structs.replace(FACTS, **change)
    assert debounce_facts(FACTS, now) is now


def test_new_addresses_of_a_service_do_not_republish_its_memory() -> None:
    facts = structs.replace(FACTS, addresses=["10.0.0.1:1"])
    assert debounce_facts(facts, FACTS) is facts


# Pressure


@pytest.mark.parametrize(
    ("avg10", "step"), [("0.00", 0), ("0.99", 0), ("1.00", 1), ("19.9", 1), ("20.00", 2), ("97", 2)]
)
def test_pressure_is_published_in_steps(avg10: str, step: int) -> None:
    assert (
        parse_psi(f"some avg10={avg10} avg60=0.00 avg300=0.00 total=7\nfull avg10=9.00 avg60=0 avg300=0 total=0")
        == step
    )


def test_a_system_without_pressure_files_has_unknown_pressure() -> None:
    assert parse_psi("") is None and parse_psi("some avg10=. avg60=0") is None
    assert parse_psi("full avg10=50.00") is None
    if sys.platform == "linux":
        assert pressure_level() is None or Path("/proc/pressure/memory").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_pressure_is_that_of_the_worst_limited_group(tmp_path: Path) -> None:
    limits = [MemoryLimit(9, 9, 9)]
    for name, avg10 in (("calm", "0.00"), ("worst", "30.00"), ("some", "2.00")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "memory.pressure").write_text(f"some avg10={avg10} avg60=0.00 avg300=0.00 total=7\n")
        limits.append(MemoryLimit(9, 9, 9, tmp_path / name))
    assert [pressure_level(limits[:2]), pressure_level(limits), pressure_level([limits[1], limits[3]])] == [0, 2, 1]


# Device


def test_the_service_does_not_load_mlx() -> None:
    program = "import sys, shoal_inference.service; assert not [m for m in sys.modules if m.split('.')[0] == 'mlx']"
    paths = ":".join(str(ROOT / p) for p in ("libs/common", "services/inference"))
    subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": paths}, check=True, timeout=60)


async def test_a_machine_is_measured_once_and_again_when_it_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "is_busy", lambda: False)
    found = await detect_device(tmp_path, None)
    assert found.accelerator in ("cpu", "metal", "cuda")
    assert found.bytes_per_s > 0
    assert read_cached_device(tmp_path, machine_fingerprint()) == found

    # A cached device is used: a start measures nothing.
    known = structs.replace(found, bytes_per_s=12345.0)
    device.save_device(tmp_path, machine_fingerprint(), known)
    assert (await detect_device(tmp_path, None)).bytes_per_s == 12345.0
    # A configured bandwidth takes precedence.
    assert (await detect_device(tmp_path, 7.0)).bytes_per_s == 7.0

    device.save_device(tmp_path, "another machine", known)
    again = await detect_device(tmp_path, None)
    assert again.bytes_per_s not in (0.0, 12345.0)
    assert read_cached_device(tmp_path, machine_fingerprint()) == again


async def test_a_measurement_on_a_busy_machine_is_used_and_not_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "is_busy", lambda: True)
    assert (await detect_device(tmp_path, None, idle_wait_s=0.0)).bytes_per_s > 0
    assert not left_in(tmp_path)


async def test_a_configured_bandwidth_measures_and_writes_nothing(tmp_path: Path) -> None:
    assert (await detect_device(tmp_path, 5e9)).bytes_per_s == 5e9
    assert not left_in(tmp_path)


@pytest.mark.parametrize(
    "left",
    [b"", b"{", b"[]", b'{"machine": 3}', b'{"machine": "\x80"}', b'{"machine": "m", "device": {"bytes_per_s": 0}}'],
)
def test_half_a_file_is_measured_again(tmp_path: Path, left: bytes) -> None:
    (tmp_path / "device.json").write_bytes(left)
    assert read_cached_device(tmp_path, "m") is None


async def test_mlx_that_cannot_be_asked_is_no_reason_not_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert await detect_device(tmp_path, None, idle_wait_s=0.0) == Device()
    assert not left_in(tmp_path)


def test_memory_facts_are_those_of_the_machine() -> None:
    facts = memory_facts(AvailableMemory().read(), None, {}, structs.replace(CPU, limit_bytes=9, bytes_per_s=3.0))
    assert 0 < facts.memory_total_bytes <= psutil.virtual_memory().total
    assert 0 < facts.memory_available_bytes <= facts.memory_total_bytes
    assert 0 <= facts.memory_reclaimable_bytes <= facts.memory_available_bytes
    assert (facts.accelerator, facts.accelerator_bytes, facts.idle_bandwidth_bytes_per_s) == ("cpu", 9, 3.0)
