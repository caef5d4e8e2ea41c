"""Processes that a killed supervisor left: recorded while it lives, ended before the next one starts.

On Linux the kernel signals children when their supervisor dies and they stop within their own deadline; elsewhere
they go on until this finds them. A pid counts only together with its start time and boot, and only in the home for
which it was recorded: in a copy of that home the record names another node's processes.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import msgspec
import psutil

from shoal_cli.node.node_plan import SERVICE_STOP_S
from shoal_cli.node_home import Home
from shoal_common.errors import AlreadyRunning
from shoal_common.host.process_identity import host_id, is_dead
from shoal_common.messages import DECODE_ERRORS
from shoal_common.messages.liveness import ProcessIdentity

_KILL_DEADLINE_S = 5.0
_POLL_INTERVAL_S = 0.02


def record(home: Home, node: str, pids: Iterable[int]) -> None:
    """Record the pids of this supervisor's children."""
    recorded_for = f"{home.identity()}/{node}"
    holders = [h for pid in pids if (h := _holder(pid, recorded_for)) is not None]
    new = home.children.with_suffix(".new")
    new.write_bytes(msgspec.json.encode(holders))
    new.replace(home.children)


def _holder(pid: int, recorded_for: str) -> ProcessIdentity | None:
    try:
        started_s = psutil.Process(pid).create_time()
    except psutil.Error:
        return None
    return ProcessIdentity(uid=recorded_for, host=host_id(), pid=pid, pid_started_s=round(started_s, 1))


def kill_orphans(home: Home) -> list[int]:
    """End what the last supervisor left, first by SIGTERM. Returns the pids. Call it only while holding the lock."""
    host, identity = host_id(), home.identity()
    left = [h for h in _running(home) if h.uid.partition("/")[0] == identity]
    for holder in left:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(holder.pid, signal.SIGTERM)
    for holder in _alive(left, host, SERVICE_STOP_S):
        # Each leads a process group: what it started ends with it.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(holder.pid, signal.SIGKILL)
    _alive(left, host, _KILL_DEADLINE_S)
    home.children.unlink(missing_ok=True)
    return [h.pid for h in left]


def refuse_copy(home: Home, node: str) -> None:
    """Raise AlreadyRunning for a copy of a home whose node runs on this machine: both would have one id (I8)."""
    for holder in _running(home):
        identity, _, recorded_node = holder.uid.partition("/")
        if recorded_node == node and identity != home.identity():
            raise AlreadyRunning(
                f"{home.root} is a copy of {_home_of(holder.pid)}, whose node {node} is running (pid {holder.pid}): "
                f"stop that node first, or make this one another node by changing `id` in {home.root / 'node.toml'}"
            )


def _home_of(pid: int) -> str:
    with suppress(psutil.Error, OSError):
        directory = Path(psutil.Process(pid).cwd())  # a child works in its home's `run`
        if directory.name == "run":
            return str(directory.parent)
    return "another home"


def _running(home: Home) -> list[ProcessIdentity]:
    """Return what is recorded here and still runs: this home's children, or those of the home it was copied from."""
    host = host_id()
    return [h for h in _recorded(home) if h.host == host and not is_dead(h, host)]


def _alive(holders: list[ProcessIdentity], host: str, wait_s: float) -> list[ProcessIdentity]:
    """Return those that have not ended after up to `wait_s`."""
    give_up_s = time.monotonic() + wait_s
    while True:
        holders = [h for h in holders if not is_dead(h, host)]
        if not holders or time.monotonic() > give_up_s:
            return holders
        time.sleep(_POLL_INTERVAL_S)


def _recorded(home: Home) -> list[ProcessIdentity]:
    try:
        return msgspec.json.decode(home.children.read_bytes(), type=list[ProcessIdentity])
    except (FileNotFoundError, NotADirectoryError, *DECODE_ERRORS):
        return []
