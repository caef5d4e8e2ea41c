"""What a supervisor that was killed left running: recorded while it lives, ended before the next one starts.

On Linux the kernel tells children of their supervisor's death and they stop by themselves, within their own
deadline; elsewhere they go on until this finds them. Pids are believed only together with their start times.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress

import msgspec
import psutil

from shoal_cli.home import Home
from shoal_common.identity import is_gone, this_host
from shoal_common.messages.facts import Holder

_STOP_S = 12.0
_KILLED_S = 5.0
_POLL_S = 0.02


def record(home: Home, pids: Iterable[int]) -> None:
    """Write down which processes are this supervisor's."""
    holders = [h for h in map(_holder, pids) if h is not None]
    fresh = home.children.with_suffix(".new")
    fresh.write_bytes(msgspec.json.encode(holders))
    fresh.replace(home.children)


def _holder(pid: int) -> Holder | None:
    try:
        started_s = psutil.Process(pid).create_time()
    except psutil.Error:
        return None
    return Holder(uid="", host=this_host(), pid=pid, pid_started_s=round(started_s, 1))


def end_leftovers(home: Home) -> list[int]:
    """End what the last supervisor left: asked first, then killed. Call it only while holding the home's lock."""
    here = this_host()
    left = [h for h in _recorded(home) if h.host == here and not is_gone(h, here)]
    for holder in left:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(holder.pid, signal.SIGTERM)
    for holder in _still_there(left, here, _STOP_S):
        # Each leads a group of its own: what it started goes with it.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(holder.pid, signal.SIGKILL)
    _still_there(left, here, _KILLED_S)
    home.children.unlink(missing_ok=True)
    return [h.pid for h in left]


def _still_there(holders: list[Holder], here: str, wait_s: float) -> list[Holder]:
    """Those that have not ended after waiting up to `wait_s` for all."""
    give_up_s = time.monotonic() + wait_s
    while True:
        holders = [h for h in holders if not is_gone(h, here)]
        if not holders or time.monotonic() > give_up_s:
            return holders
        time.sleep(_POLL_S)


def _recorded(home: Home) -> list[Holder]:
    try:
        return msgspec.json.decode(home.children.read_bytes(), type=list[Holder])
    except (FileNotFoundError, msgspec.DecodeError):
        return []
