"""`shoal down` and `shoal restart`: orders to the supervisor of this home."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

import psutil

from shoal_cli.home import Home, RunLock, read_or_empty
from shoal_cli.node.control import Request, Status, ask
from shoal_cli.node.decide import ChildStatus
from shoal_cli.node.leftovers import end_leftovers
from shoal_cli.node.plan import NATS_STOP_S, SERVICE_STOP_S
from shoal_common.errors import Failed, Unavailable
from shoal_common.messages import Message, decode

_ASK_DEADLINE_S = 5.0
_RESTART_DEADLINE_S = 90.0
_STOP_DEADLINE_S = SERVICE_STOP_S + NATS_STOP_S + 5.0
_POLL_S = 0.02


class Stopped(Message):
    """What `shoal down` found and ended."""

    was_running: bool
    pid: int = 0
    leftovers: list[int] = []


def down(home: Home) -> Stopped:
    """Stop this home's node and return when nothing of it runs. Nothing running is success too (I5)."""
    lock = RunLock(home)
    if lock.is_free():
        return Stopped(was_running=False, leftovers=_sweep(home, lock))
    pid = int(read_or_empty(home.pid) or 0)
    supervisor = _process(pid)
    try:
        ask(home, Request(op="stop"), _ASK_DEADLINE_S)
    except Unavailable:
        # It holds the lock and does not answer: starting, stopping already, or stuck. The signal means the same.
        if pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
    give_up_s = time.monotonic() + _STOP_DEADLINE_S
    while not (lock.is_free() and _has_ended(supervisor)):
        if time.monotonic() > give_up_s:
            raise Failed(
                f"the supervisor (pid {pid or 'unknown'}) has not ended after {_STOP_DEADLINE_S:.0f} s: "
                f"`kill -9 {pid or 'PID'}`, then `shoal down` once more ends what it leaves"
            )
        time.sleep(_POLL_S)
    return Stopped(was_running=True, pid=pid, leftovers=_sweep(home, lock))


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid) if pid else None
    except psutil.NoSuchProcess:
        return None


def _has_ended(process: psutil.Process | None) -> bool:
    """Whether it is gone; its parent may not have noticed yet."""
    try:
        return process is None or not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _sweep(home: Home, lock: RunLock) -> list[int]:
    if not home.children.exists():
        return []
    lock.take()
    try:
        return end_leftovers(home)
    finally:
        home.forget_run()
        lock.release()


def restart(home: Home, name: str) -> ChildStatus:
    """Restart one child of this home's supervisor and return when it is ready again."""
    return decode(ask(home, Request(op="restart", service=name), _RESTART_DEADLINE_S), ChildStatus)


def supervisor_status(home: Home) -> Status | None:
    """This home's supervisor and its children, or None when none answers."""
    try:
        return decode(ask(home, Request(op="status"), _ASK_DEADLINE_S), Status)
    except Unavailable:
        return None
