"""What a liveness key says: who holds it, and that service's facts now. Kept small: it is rewritten every beat."""

from __future__ import annotations

from shoal_common.messages import Message


class Holder(Message):
    """The process behind a node's service.

    `host` names the machine, this boot of it and the pid namespace, so that a process on the same machine can
    be looked up by pid; `pid_started_s` tells it from a later process that got the same pid.
    """

    uid: str
    host: str
    pid: int
    pid_started_s: float = 0.0


class Facts(Message):
    """A service's facts. Each service fills in the fields that are its own."""

    addresses: list[str] = []
    """Where its data port answers, `host:port`, best first (fileserver, gateway, inference)."""
    memory_total_bytes: int = 0
    memory_available_bytes: int = 0
    disk_free_bytes: int = 0


class Live(Message):
    """The value of `live` at `<node>.<service>`."""

    holder: Holder
    version: str
    started_at_s: float = 0.0
    facts: Facts = Facts()
