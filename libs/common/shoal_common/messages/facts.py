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
    """What instances may use of this machine at most: its memory, or less where a setting says so (inference; the
    same for what follows)."""
    memory_available_bytes: int = 0
    """Of that, what is free or can be had at once. What `stages` occupy is not in it."""
    memory_reclaimable_bytes: int = 0
    """Of what is available, what the system has lent to caches."""
    stages: dict[str, int] = {}
    """What this node's stages occupy now, by `<instance>/<rank>`. None from versions that counted it as available."""
    memory_pressure: int | None = None
    """How much the machine suffers for want of memory: 0 not at all, 1 some, 2 much. None: not known."""
    accelerator: str = ""
    """What MLX computes with: cpu, metal, cuda; "" while it is not known."""
    accelerator_bytes: int | None = None
    """What the accelerator can use at most; None: no limit of its own, or not known."""
    memory_bytes_per_s: float = 0.0
    """How fast MLX reads weights here, measured; 0: not yet."""
    working_bytes_per_s: float = 0.0
    """What stages have shown of it while they work, where that is something else; 0: nothing."""
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
