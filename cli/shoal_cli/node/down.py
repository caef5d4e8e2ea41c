"""Stopping this home's node, restarting one of its services, and asking for its status."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import psutil

from shoal_cli.node.children.orphans import kill_orphans
from shoal_cli.node.children.restart_policy import ChildStatus
from shoal_cli.node.control import ControlRequest, SupervisorStatus, ask
from shoal_cli.node.node_plan import NATS_STOP_S, SERVICE_STOP_S
from shoal_cli.node_home import Home, RunLock
from shoal_common.errors import InternalError, Unavailable
from shoal_common.messages import WireStruct, decode

_ASK_DEADLINE_S = 5.0
_RESTART_DEADLINE_S = 90.0
_STOP_DEADLINE_S = SERVICE_STOP_S + NATS_STOP_S + 5.0
_POLL_INTERVAL_S = 0.02


class DownResult(WireStruct):
    """What `shoal down` stopped."""

    was_running: bool
    pid: int = 0
    orphans: list[int] = []


def down(home: Home) -> DownResult:
    """Stop this home's node and return when none of its processes is left. Nothing running is success too (I5)."""
    lock = RunLock(home)
    if lock.is_free():
        return DownResult(was_running=False, orphans=_stop_orphans(home, lock))
    supervisor = lock_holder(home)
    pid = supervisor.pid if supervisor else 0
    try:
        ask(home, ControlRequest(op="stop"), _ASK_DEADLINE_S)
    except Unavailable:
        # It holds the lock and does not answer: starting, already stopping, or stuck. The signal means the same.
        if supervisor:
            with suppress(psutil.NoSuchProcess):
                supervisor.terminate()
    give_up_s = time.monotonic() + _STOP_DEADLINE_S
    while not (lock.is_free() and _has_ended(supervisor)):
        if time.monotonic() > give_up_s:
            raise InternalError(
                f"the supervisor (pid {pid or 'unknown'}) has not stopped after {_STOP_DEADLINE_S:.0f} s: "
                f"`kill -9 {pid or 'PID'}`, then run `shoal down` again to stop its services"
            )
        time.sleep(_POLL_INTERVAL_S)
    return DownResult(was_running=True, pid=pid, orphans=_stop_orphans(home, lock))


def lock_holder(home: Home) -> psutil.Process | None:
    """Return the process that `supervisor.pid` names if it has this home's lock open: the file may be a copy."""
    pid = home.read_pid()
    try:
        process = psutil.Process(pid) if pid else None
        if process and any(Path(file.path).samefile(home.lock) for file in process.open_files()):
            return process
    except (psutil.Error, OSError):
        pass
    return None


def _has_ended(process: psutil.Process | None) -> bool:
    """Return whether a process has ended; its parent may not have noticed yet."""
    try:
        return process is None or not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _stop_orphans(home: Home, lock: RunLock) -> list[int]:
    if not home.children.exists():
        return []
    lock.acquire()
    try:
        return kill_orphans(home)
    finally:
        home.clear_run()
        lock.release()


def restart(home: Home, name: str) -> ChildStatus:
    """RestartDecision one child of this home's supervisor and return when it is ready again."""
    return decode(ask(home, ControlRequest(op="restart", service=name), _RESTART_DEADLINE_S), ChildStatus)


def supervisor_status(home: Home) -> SupervisorStatus | None:
    """Return the status of this home's supervisor, or None when none answers."""
    try:
        return decode(ask(home, ControlRequest(op="status"), _ASK_DEADLINE_S), SupervisorStatus)
    except Unavailable:
        return None
