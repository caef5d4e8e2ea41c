"""Every setting that more than one program reads, declared once: a field, its default, and what `setting(…)` says."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta, field

from shoal_common.names import SERVICES
from shoal_common.settings.declaration import (
    Bandwidth,
    Bytes,
    BytesPerSecond,
    CliFlag,
    Port,
    Seconds,
    Section,
    setting,
)

FILESERVER_PORT, STAGE_PORT, STAGE_PORT_COUNT = 8081, 8082, 16
"""With the gateway's 8080 one block: 8080 to 8097."""
EvictionPolicy = Literal["manual", "lru"]
TlsMode = Literal["auto", "off"]
Sealers = Annotated[
    str,
    Meta(
        pattern=r"^[a-z0-9-]+( *, *[a-z0-9-]+)*$",
        max_length=4096,
        extra={"expected": "cluster, none, or names of nodes with commas"},
    ),
]
"""`cluster`: the nodes that the operator let in."""


class TransferSettings(Section, frozen=True, kw_only=True):
    """How fast this node moves weights: kept and published by storage, applied by the fetcher and the fileserver."""

    section: ClassVar[str] = "transfer"

    max_upload_bytes_per_s: Annotated[
        BytesPerSecond | None,
        setting(
            "limit for sending to all other nodes together",
            example="20MB",
            unset="no limit",
            flag=CliFlag("--max-upload-rate"),
            is_changeable=True,
        ),
    ] = None
    max_hub_bytes_per_s: Annotated[
        BytesPerSecond | None,
        setting(
            "limit for downloading from the hub",
            example="20MB",
            unset="no limit",
            flag=CliFlag("--max-hub-rate"),
            is_changeable=True,
        ),
    ] = None
    max_peer_bytes_per_s: Annotated[
        BytesPerSecond | None,
        setting(
            "limit for downloading from each other node",
            example="20MB",
            unset="no limit",
            flag=CliFlag("--max-peer-rate"),
            is_changeable=True,
        ),
    ] = None


class PublishedSettings(TransferSettings, frozen=True):
    """The settings whose values are fields of `storage.<node>`."""

    section: ClassVar[str] = "storage"

    quota_bytes: Annotated[
        Bytes | None,
        setting(
            "quota for models",
            example="200GB",
            unset="limited by the disk only",
            flag=CliFlag("--max-storage"),
            is_changeable=True,
        ),
    ] = field(default=None, name="max_storage_bytes")
    headroom_bytes: Annotated[
        Bytes,
        setting("space to keep free on the disk", example="5GB", flag=CliFlag("--headroom"), is_changeable=True),
    ] = 1 << 30
    eviction_policy: Annotated[
        EvictionPolicy,
        setting(
            "what happens to a model that does not fit: manual refuses it, lru evicts old ones",
            flag=CliFlag("--eviction-policy"),
            is_changeable=True,
        ),
    ] = "manual"
    partial_retention_s: Annotated[
        Seconds,
        setting(
            "how long to keep data of abandoned downloads, 0 to delete it",
            example="7d",
            flag=CliFlag("--partial-retention"),
            is_changeable=True,
        ),
    ] = 7 * 86400
    trust_sealers: Annotated[
        Sealers,
        setting(
            "whose word that a blob is intact makes it ready before it is hashed here: cluster, none, or nodes",
            example='"a,b"',
        ),
    ] = "cluster"


class StorageSettings(PublishedSettings, frozen=True, kw_only=True):
    """All settings that storage keeps."""

    section: ClassVar[str] = "storage"

    libraries: Annotated[
        tuple[str, ...],
        Meta(max_length=64),
        setting(
            "read-only directories whose models are served as they are: not copied, never written",
            example="~/.cache/huggingface/hub",
            flag=CliFlag(
                "--add-library",
                "also serve the models in this directory, like ~/.cache/huggingface/hub: not copied, never written",
            ),
            remove_flag=CliFlag("--remove-library", "stop serving this directory"),
            is_changeable=True,
            is_local=True,
        ),
    ] = ()
    volumes: Annotated[
        tuple[str, ...],
        Meta(max_length=16),
        setting(
            "directories on other disks in which models are stored too",
            example="/mnt/big/shoal",
            flag=CliFlag("--add-volume", "also store models in this directory of another disk"),
            remove_flag=CliFlag(
                "--remove-volume", "stop using this directory; its files stay, its models are not served"
            ),
            is_changeable=True,
            is_local=True,
        ),
    ] = ()
    ballast_bytes: Annotated[
        Bytes, setting("size of the ballast file, which a full disk gives up; 0 for none", example="64MiB")
    ] = 64 << 20
    path: Annotated[
        str, setting("the store's directory", example='"/mnt/models"', unset="`<home>/store`", has_variable=False)
    ] = ""


class EncryptionSettings(Section, frozen=True, kw_only=True):
    """What is encrypted between machines. Hidden states always are."""

    section: ClassVar[str] = "transfer"

    encrypt_weights: Annotated[
        bool,
        setting(
            "send weights to other machines encrypted, and take no others; false saves processor time where nobody "
            "else can listen"
        ),
    ] = True


class FileserverSettings(EncryptionSettings, frozen=True, kw_only=True):
    """What this node's fileserver offers."""

    section: ClassVar[str] = "fileserver"

    serve_peers: Annotated[
        bool, setting("send weights to other nodes; false: only to programs that use this node as a hub")
    ] = True
    bind: Annotated[
        str,
        setting(
            "address to listen on",
            example='"192.168.1.5"',
            unset="as all ports (`SHOAL_BIND`)",
            has_variable=False,
        ),
    ] = ""
    max_serving_connections: Annotated[
        int, Meta(ge=1, le=4096), setting("most connections at once; half of them from one address")
    ] = 256


class InferenceSettings(Section, frozen=True, kw_only=True):
    """What stages may take of this machine."""

    section: ClassVar[str] = "inference"

    max_memory_bytes: Annotated[
        Bytes | None,
        setting("most memory that placement may use here", example="24GB", unset="what the machine or container has"),
    ] = None
    force_floor_bytes: Annotated[
        Bytes | None,
        setting(
            "memory that stages placed by force leave free",
            example="1GB",
            unset="a fiftieth of the memory, at least 256 MiB",
        ),
    ] = None
    memory_bytes_per_s: Annotated[
        Bandwidth | None, setting("memory bandwidth of this machine", example="400GB", unset="measured")
    ] = None


class TlsSettings(Section, frozen=True, kw_only=True):
    """Whether the gateway speaks TLS: read by the gateway, and by those who publish its URL."""

    section: ClassVar[str] = "gateway"

    tls: Annotated[
        TlsMode,
        setting(
            "TLS beyond loopback, with the node's certificate; off: for a reverse proxy with one of its own",
            has_variable=False,
        ),
    ] = "auto"


class PortSettings(Section, frozen=True, kw_only=True):
    """The ports of this node: NATS's, and one block for the rest."""

    section: ClassVar[str] = "node"

    nats_port: Annotated[Port, setting("port of NATS, 0 for any free one", flag=CliFlag("--nats-port"))] = 4222
    gateway_port: Annotated[Port, setting("port of the gateway, 0 for any free one", flag=CliFlag("--port"))] = 8080
    fileserver_port: Annotated[
        Port | None,
        setting(
            "port of the fileserver, for weights and the hub's protocol; 0 for any free one",
            example="8081",
            unset=f"`{FILESERVER_PORT}`, or any free one where that is taken",
        ),
    ] = None
    stage_port: Annotated[
        Annotated[int, Meta(ge=0, le=65536 - STAGE_PORT_COUNT)] | None,
        setting(
            f"first of the {STAGE_PORT_COUNT} ports of stages, 0 for any free ones",
            example="8082",
            unset=f"`{STAGE_PORT}`, and any free one once all {STAGE_PORT_COUNT} are taken",
        ),
    ] = None


class NodeSettings(PortSettings, frozen=True, kw_only=True):
    """What this node was told by options of `shoal up`, which keeps them."""

    section: ClassVar[str] = "node"

    bind: Annotated[
        str,
        setting(
            "address to listen on",
            example='"0.0.0.0"',
            unset="`127.0.0.1`; `0.0.0.0` in the cluster of another machine",
            flag=CliFlag("--bind"),
        ),
    ] = ""
    nats: Annotated[
        tuple[str, ...],
        Meta(max_length=16, extra={"items": "URLs of NATS servers"}),
        setting("NATS servers to use instead of an own one", example="nats://host:4222", flag=CliFlag("--nats")),
    ] = ()
    without: Annotated[
        tuple[Annotated[str, Meta(pattern=f"^({'|'.join(SERVICES)})$")], ...],
        Meta(max_length=len(SERVICES), extra={"items": f"services: {', '.join(SERVICES)}"}),
        setting("services that do not run here", example="gateway", flag=CliFlag("--no-SERVICE")),
    ] = ()
    hub: Annotated[
        str,
        setting(
            "hub instead of huggingface.co; HF_ENDPOINT overrides it",
            example='"https://hub.example"',
            unset="huggingface.co",
            flag=CliFlag("--hub"),
            has_variable=False,
        ),
    ] = ""
