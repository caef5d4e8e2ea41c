"""Detect the accelerator and the memory bandwidth with MLX in a child process, and cache the result.

`<home>/device.json` records the measurement and the machine: a home that was copied to another machine, or that runs
another version of MLX, is measured again. A failed detection is tried again at the next start of the service.
"""

from __future__ import annotations

import asyncio
import os
import platform
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import msgspec
import psutil

from shoal_common.host.cgroup import AvailableMemory, tightest
from shoal_common.host.own_process import python_environment
from shoal_common.logs import StructuredLogger
from shoal_common.messages import DECODE_ERRORS
from shoal_inference.stage.compute.device import Device
from shoal_inference.stage.ipc.blas import child_environment

log = StructuredLogger("device")

DETECTION_TIMEOUT_S = 60.0
"""Importing MLX takes a second, and much longer on a busy machine."""
IDLE_WAIT_TIMEOUT_S = 300.0
"""How long the measurement waits for a busy machine to become idle: beside other work it means little."""
_BUSY_POLL_INTERVAL_S = 10.0
_MIN_AVAILABLE_BYTES = 2 << 30
"""With less than this available, nothing is measured: the measurement takes 256 MiB."""


class DeviceCache(msgspec.Struct, frozen=True):
    """The contents of `device.json`."""

    machine: str
    device: Device
    observed_bytes_per_s: float = 0.0
    """Bandwidth observed while stages worked; 0: none yet."""


def machine_fingerprint() -> str:
    """Return what a measurement is valid for: this machine and this version of MLX."""
    parts = (platform.node(), platform.machine(), os.cpu_count(), psutil.virtual_memory().total)
    return " ".join(map(str, (*parts, metadata.version("mlx"))))


def _read(home: Path, machine: str) -> DeviceCache | None:
    try:
        cached = msgspec.json.decode((home / "device.json").read_bytes(), type=DeviceCache)
    except (OSError, *DECODE_ERRORS):
        return None
    return cached if cached.machine == machine and cached.device.bytes_per_s > 0 else None


def read_cached_device(home: Path, machine: str) -> Device | None:
    """Return what an earlier start measured on this machine; None when it must be measured."""
    cached = _read(home, machine)
    return None if cached is None else cached.device


def has_to_be_measured(home: Path) -> bool:
    """Return whether no measurement of this machine while it was idle is kept. Reads a file."""
    return read_cached_device(home, machine_fingerprint()) is None


def read_observed_bandwidth(home: Path) -> float:
    """Return the bandwidth that stages showed on this machine before; 0: none."""
    cached = _read(home, machine_fingerprint())
    return 0.0 if cached is None else max(cached.observed_bytes_per_s, 0.0)


def save_observed_bandwidth(home: Path, bytes_per_s: float) -> None:
    """Save the bandwidth that stages showed; does nothing where no measurement is cached."""
    machine = machine_fingerprint()
    device = read_cached_device(home, machine)
    if device is not None:
        save_device(home, machine, device, bytes_per_s)


def save_device(home: Path, machine: str, device: Device, observed_bytes_per_s: float = 0.0) -> None:
    """Save the measurement for the next start. It is only a cache: a failed write is no error."""
    temporary = home / "device.json.new"
    with suppress(OSError):
        temporary.write_bytes(msgspec.json.encode(DeviceCache(machine, device, observed_bytes_per_s)))
        temporary.replace(home / "device.json")


def is_busy() -> bool:
    """Return whether other programs use more than half of this machine's cores."""
    return psutil.getloadavg()[0] > (os.cpu_count() or 1) / 2


async def detect_device(
    home: Path, configured_bytes_per_s: float | None, idle_wait_s: float = IDLE_WAIT_TIMEOUT_S
) -> Device:
    """Return MLX's device on this machine, measured once per machine; a configured `speed` is not measured.

    A machine that stays busy for `timeout_s` is measured all the same, and again at the next start.
    """
    machine = await asyncio.to_thread(machine_fingerprint)
    cached = await asyncio.to_thread(read_cached_device, home, machine)
    limit = tightest(await asyncio.to_thread(AvailableMemory().read))
    measure = configured_bytes_per_s is None and cached is None and limit.available_bytes >= _MIN_AVAILABLE_BYTES
    known = cached or Device(bytes_per_s=configured_bytes_per_s or 0.0)
    if configured_bytes_per_s is not None:
        known = msgspec.structs.replace(known, bytes_per_s=configured_bytes_per_s)
    # On macOS the accelerator's memory limit is a system setting: read it at each start.
    if not measure and sys.platform != "darwin":
        return known
    was_idle = not measure or await _wait_idle(idle_wait_s)
    detected = await _detect(measure)
    if detected is None:
        return known
    if measure:
        log.info(
            "memory bandwidth measured", bytes_per_s=round(detected.bytes_per_s), accelerator=detected.accelerator
        )
        if was_idle:
            await asyncio.to_thread(save_device, home, machine, detected)
        return detected
    return msgspec.structs.replace(detected, bytes_per_s=known.bytes_per_s)


async def _wait_idle(timeout_s: float) -> bool:
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    while is_busy():
        if loop.time() >= deadline_s:
            return False
        await asyncio.sleep(_BUSY_POLL_INTERVAL_S)
    return True


async def _detect(measure: bool) -> Device | None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "shoal_inference.stage.compute.device",
        *(["--measure"] if measure else []),
        env=child_environment(python_environment(os.environ)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(DETECTION_TIMEOUT_S):
            output, errors = await process.communicate()
        return msgspec.json.decode(output, type=Device)
    except TimeoutError:
        log.warning("device detection timed out", timeout_s=DETECTION_TIMEOUT_S)
    except DECODE_ERRORS:
        log.warning("device detection failed", reason=errors.decode(errors="replace")[-300:])
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return None
