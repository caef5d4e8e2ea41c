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
    network: str = ""
    """The machine, this boot of it, and the network namespace: within one such value loopback is the same."""


class Link(Message):
    """One way to a data port: its address, and the interface that carries it."""

    address: str
    """`host:port`"""
    interface: str = ""
    kind: str = ""
    """thunderbolt, ethernet, wifi, virtual or loopback; "" and words of a later version: not known."""
    mbit: int = 0
    """Speed of the interface in Mbit/s, 0 where the system does not say."""


class Facts(Message):
    """A service's facts. Each service fills in the fields that are its own."""

    addresses: list[str] = []
    """Where its data port answers, `host:port`, best first (fileserver, gateway)."""
    links: list[Link] = []
    """The same with what carries them, and loopback where it listens there as well, which is for its own machine."""
    memory_total_bytes: int = 0
    memory_available_bytes: int = 0
    disk_free_bytes: int = 0


class LostSight(Message):
    """`shoal.v1.lost.<node>`: a connection to the node broke or was refused. Whoever minds asks the node itself."""

    by: str
    """The node that says so."""
    why: str = ""


class Live(Message):
    """The value of `live` at `<node>.<service>`."""

    holder: Holder
    version: str
    started_at_s: float = 0.0
    facts: Facts = Facts()
