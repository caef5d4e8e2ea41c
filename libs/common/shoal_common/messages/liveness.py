"""The value of a liveness key: its process, and facts about its node. Kept small: every renewal writes it again."""

from __future__ import annotations

from shoal_common.messages import WireStruct


class ProcessIdentity(WireStruct):
    """The process behind a node's service."""

    uid: str
    """Random id of this incarnation of the process."""
    host: str
    """The machine, this boot and the pid namespace: processes with the same value can look each other up by pid."""
    pid: int
    """Process id on `host`."""
    pid_started_s: float = 0.0
    """When the process started; tells it from a later process with the same pid."""
    network_namespace: str = ""
    """The machine, this boot and the network namespace: equal values share one loopback interface."""


class NodeAddress(WireStruct):
    """An address of a data port, and the interface that carries it."""

    address: str
    """`host:port`."""
    interface: str = ""
    """The interface's name."""
    kind: str = ""
    """thunderbolt, ethernet, wifi, virtual or loopback; "" or any other word means unknown."""
    mbit: int = 0
    """Interface speed in Mbit/s; 0 if the system does not report it."""
    tls: bool = False
    """The port speaks TLS there, with the node's certificate, and nothing else."""


class NodeFacts(WireStruct):
    """Facts about a service and its node. Each service fills in its own fields."""

    addresses: list[str] = []
    """Addresses of the data port, `host:port`, best first (fileserver, gateway)."""
    links: list[NodeAddress] = []
    """The same addresses with their interfaces, plus loopback where the port listens on it, for this machine only."""
    serves_peers: bool = True
    """Whether other nodes may read blobs there (fileserver)."""
    memory_total_bytes: int = 0
    """Memory that instances may use at most: the machine's, or less if a setting says so (inference)."""
    memory_available_bytes: int = 0
    """Of the total, what is free or can be reclaimed now; excludes what `stages` occupy (inference)."""
    memory_reclaimable_bytes: int = 0
    """Of the available memory, what the system uses for caches (inference)."""
    stages: dict[str, int] = {}
    """Bytes each stage occupies now, by `<instance>/<rank>`; empty from versions that count them as available."""
    memory_pressure: int | None = None
    """Memory pressure: 0 none, 1 some, 2 severe; null if unknown (inference)."""
    accelerator: str = ""
    """MLX's device: cpu, metal or cuda; "" while unknown (inference)."""
    accelerator_bytes: int | None = None
    """Memory that the accelerator can use at most; null if unlimited or unknown (inference)."""
    idle_bandwidth_bytes_per_s: float = 0.0
    """Rate at which MLX reads weights on an idle machine, measured; 0 before that (inference)."""
    observed_bandwidth_bytes_per_s: float = 0.0
    """The rate that running stages have shown, where it differs; 0 if none (inference)."""
    disk_free_bytes: int = 0
    """Free space on the store's disk (storage)."""
    stage_port: int = 0
    """First of the ports on which its stages listen; 0: any (inference)."""


class PeerConnectionLost(WireStruct):
    """A connection to the node broke or was refused. Receivers should ping the node before acting.

    Subject `shoal.v1.lost.<node>` (core NATS, not stored), published by any service of another node.
    """

    reported_by: str
    """The node that reports it."""
    reason: str = ""
    """Why the connection failed."""


class LivenessRecord(WireStruct):
    """A service is alive. `live` key `<node>.<service>`, published by that service."""

    holder: ProcessIdentity
    """The process that runs the service."""
    version: str
    """Version of Shoal that the service runs."""
    started_at_s: float = 0.0
    """When the service started."""
    facts: NodeFacts = NodeFacts()
    """Facts about the service and its node."""
