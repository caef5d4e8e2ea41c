"""What this machine computes with, asked of MLX in a process of its own, and kept for the next start.

`<home>/device.json` says what was measured, and on which machine: a home that was copied to another one, or met
another version of MLX, is measured anew. What cannot be asked is tried again at the next start of the service.
"""

from __future__ import annotations

import asyncio
import os
import platform
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import msgspec
import psutil

from shoal_common.cgroup import Memory, least
from shoal_common.errors import BadInput
from shoal_common.logs import Log
from shoal_inference.stage.blas import child_environment
from shoal_inference.stage.device import Device

log = Log("device")

LOOK_S = 60.0
"""Importing MLX takes a second, and much longer on a machine that is busy."""
BUSY_S = 300.0
"""How long a start waits for a machine that has other things to do: what is measured beside them says little."""
_BUSY_LOOK_S = 10.0
_LEAST_AVAILABLE_BYTES = 2 << 30
"""With less than this nobody takes 256 MiB to measure."""


class Kept(msgspec.Struct, frozen=True):
    """The file."""

    machine: str
    device: Device
    working_bytes_per_s: float = 0.0
    """What stages have shown since; 0: nothing else."""


def read_speed(settings: Mapping[str, object], environ: Mapping[str, str]) -> float | None:
    """`[inference] memory_bytes_per_s` of node.toml, or SHOAL_MEMORY_BYTES_PER_S; None: measure. Raises BadInput."""
    value = environ.get("SHOAL_MEMORY_BYTES_PER_S") or settings.get("memory_bytes_per_s")
    if not value:
        return None
    try:
        speed = float(str(value))
    except ValueError:
        speed = -1.0
    if not 0 < speed < float("inf"):
        raise BadInput(f"memory_bytes_per_s {value!r} is not a number of bytes a second")
    return speed


def this_machine() -> str:
    """What a measurement belongs to: this machine and this MLX."""
    parts = (platform.node(), platform.machine(), os.cpu_count(), psutil.virtual_memory().total)
    return " ".join(map(str, (*parts, metadata.version("mlx"))))


def _read(home: Path, machine: str) -> Kept | None:
    try:
        kept = msgspec.json.decode((home / "device.json").read_bytes(), type=Kept)
    except (OSError, msgspec.MsgspecError):
        return None
    return kept if kept.machine == machine and kept.device.bytes_per_s > 0 else None


def read_kept(home: Path, machine: str) -> Device | None:
    """What an earlier start has measured here; None when it has to be measured."""
    kept = _read(home, machine)
    return None if kept is None else kept.device


def read_working(home: Path) -> float:
    """What stages have shown on this machine before; 0: nothing."""
    kept = _read(home, this_machine())
    return 0.0 if kept is None else max(kept.working_bytes_per_s, 0.0)


def keep_working(home: Path, bytes_per_s: float) -> None:
    """Write what stages have shown beside what was measured; nothing where that is not kept."""
    machine = this_machine()
    device = read_kept(home, machine)
    if device is not None:
        keep(home, machine, device, bytes_per_s)


def keep(home: Path, machine: str, device: Device, working_bytes_per_s: float = 0.0) -> None:
    """Write it for the next start. It is only a saving: a disk that does not take it is no error."""
    fresh = home / "device.json.new"
    with suppress(OSError):
        fresh.write_bytes(msgspec.json.encode(Kept(machine, device, working_bytes_per_s)))
        fresh.replace(home / "device.json")


def busy() -> bool:
    """Whether other programs compute on more than half of this machine's cores."""
    return psutil.getloadavg()[0] > (os.cpu_count() or 1) / 2


async def find_device(home: Path, speed: float | None, patience_s: float = BUSY_S) -> Device:
    """What MLX computes with here. Measured once on each machine; a speed that a person gave is not.

    A machine that stays busy for `patience_s` is measured all the same, and again at the next start.
    """
    machine = await asyncio.to_thread(this_machine)
    kept = await asyncio.to_thread(read_kept, home, machine)
    room = least(await asyncio.to_thread(Memory().look))
    measure = speed is None and kept is None and room.available_bytes >= _LEAST_AVAILABLE_BYTES
    known = kept or Device(bytes_per_s=speed or 0.0)
    if speed is not None:
        known = msgspec.structs.replace(known, bytes_per_s=speed)
    # An accelerator's limit is a setting of macOS, so it is asked for at each start there.
    if not measure and sys.platform != "darwin":
        return known
    quiet = not measure or await _quiet(patience_s)
    found = await _ask(measure)
    if found is None:
        return known
    if measure:
        log.info("memory measured", bytes_per_s=round(found.bytes_per_s), accelerator=found.accelerator)
        if quiet:
            await asyncio.to_thread(keep, home, machine, found)
        return found
    return msgspec.structs.replace(found, bytes_per_s=known.bytes_per_s)


async def _quiet(patience_s: float) -> bool:
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + patience_s
    while busy():
        if loop.time() >= give_up_s:
            return False
        await asyncio.sleep(_BUSY_LOOK_S)
    return True


async def _ask(measure: bool) -> Device | None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "shoal_inference.stage.device",
        *(["--measure"] if measure else []),
        env=child_environment(os.environ),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(LOOK_S):
            said, complaint = await process.communicate()
        return msgspec.json.decode(said, type=Device)
    except TimeoutError:
        log.warning("MLX did not say in time what it computes with", deadline_s=LOOK_S)
    except msgspec.MsgspecError:
        log.warning("MLX cannot be asked what it computes with", why=complaint.decode(errors="replace")[-300:])
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return None
