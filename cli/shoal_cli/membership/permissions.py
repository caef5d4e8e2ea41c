"""What each service may do on NATS: the table from which the server's configuration and docs are made.

A service of a node reads the cluster's state, writes its own node's keys, answers its own subjects, and calls what
the table names. Two things are left to trust: placement's leader may run on any node, so the placement service of
every node may write what the leader writes; and the key of a stage does not name its node.
"""

from __future__ import annotations

import msgspec

from shoal_common.bus import subjects
from shoal_common.bus.subjects import ANY, ROOT
from shoal_common.names import check_node

BUCKETS = ("live", "spec", "state", "lease", "done")
STREAMS = ("CMD", "EVT", *(f"KV_{bucket}" for bucket in BUCKETS))


class Permissions(msgspec.Struct, frozen=True):
    """Subjects that an identity may publish and subscribe to, as NATS patterns. All others are refused."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


class ServiceRights(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the table. `{node}` stands for the service's own node, `*` for any, as in NATS."""

    reads: tuple[str, ...]
    """Buckets whose keys it reads and follows, besides `live`."""
    writes: tuple[str, ...] = ()
    """Keys that it writes, with their bucket, besides its own liveness and, with commands, outcomes."""
    calls: tuple[str, ...] = ()
    """Requests that it sends: `service.node.verb`."""
    commands: tuple[str, ...] = ()
    """Nodes whose commands for this service it executes, `{node}` or `any`."""
    sends: tuple[str, ...] = ()
    """Commands that it sends: `service.node.verb`."""
    has_endpoints: bool = True
    """Whether it answers requests."""
    publishes: tuple[str, ...] = ()
    """Other subjects that it publishes, below the root."""
    subscribes: tuple[str, ...] = ()
    """Other subjects that it hears, below the root."""
    api: tuple[str, ...] = ()
    """JetStream API subjects beyond those of its reads and commands."""


RIGHTS: dict[str, ServiceRights] = {
    "storage": ServiceRights(
        reads=("spec", "state"),
        writes=("state.storage.{node}", "state.model.{node}.*", "state.shard.{node}.*"),
        calls=("fetcher.{node}.stop_downloads",),
        commands=("{node}",),
    ),
    "fetcher": ServiceRights(
        reads=("spec", "state", "lease", "done"),
        writes=("spec.download.{node}.*", "state.download.{node}.*", "lease.origin.*"),
        calls=("storage.{node}.*", "storage.*.manifest"),
        commands=("{node}",),
        publishes=("have.{node}.*", "lost.*"),
        subscribes=("have.*.*",),
    ),
    "fileserver": ServiceRights(
        reads=("state",),
        calls=("storage.*.manifest",),
        has_endpoints=False,
    ),
    "placement": ServiceRights(
        reads=("spec", "state", "lease", "done"),
        # `>`: the leader removes what retired nodes leave behind.
        writes=("spec.>", "state.>", "lease.leader.placement"),
        calls=("placement.*.links", "fetcher.*.shape", "*.*.ping"),
        commands=(ANY,),
        publishes=("lost.*",),
        subscribes=("lost.*",),
        api=("STREAM.PURGE.CMD", "CONSUMER.DELETE.CMD.*"),
    ),
    "inference": ServiceRights(
        reads=("spec", "state", "done"),
        writes=("state.stage.*.*",),
        calls=("storage.*.record_use", "storage.{node}.lease", "storage.{node}.release_lease"),
        sends=("fetcher.{node}.download",),
        publishes=("tok.*", "lost.*"),
    ),
    "gateway": ServiceRights(
        reads=("spec", "state", "done"),
        calls=("storage.*.plan", "placement.*.*", "inference.*.generate", "inference.*.cancel", "*.*.ping"),
        sends=("*.*.*",),
        has_endpoints=False,
        publishes=("lost.*",),
        subscribes=("tok.*",),
        api=("CONSUMER.CREATE.EVT", "CONSUMER.CREATE.EVT.>", "CONSUMER.MSG.NEXT.EVT.*", "CONSUMER.DELETE.EVT.*"),
    ),
}


def inbox_prefix(service: str, node: str) -> str:
    """Return the prefix of the inboxes of a service: nobody else may subscribe below it."""
    return f"_INBOX.{check_node(node)}.{service}"


def permissions(service: str, node: str) -> Permissions:
    """Return what a service of a node may publish and subscribe to."""
    rights, inbox = RIGHTS[service], inbox_prefix(service, node)
    names = [name.format(node=check_node(node)) for name in rights.commands]
    sends = [command.format(node=node) for command in rights.sends]
    publish = [
        # Replies: an inbox cannot be guessed, and only its owner hears it.
        "_INBOX.>",
        f"$KV.live.{node}.{service}",
        f"{ROOT}.evt.{service}.{node}.*",
        *(f"$KV.{key.format(node=node)}" for key in rights.writes),
        *(f"{ROOT}.svc.{call.format(node=node)}" for call in rights.calls),
        *(f"{ROOT}.cmd.{command}" for command in sends),
        *(f"{ROOT}.{subject.format(node=node)}" for subject in rights.publishes),
        # An outcome is named by its command. A sender cancels there what a service that is down never got.
        *(("$KV.done.*",) if names or sends else ()),
        *_jetstream(rights),
    ]
    for name in names:
        consumer = subjects.consumer_name(service, name)
        publish += [
            f"$JS.API.CONSUMER.CREATE.CMD.{consumer}.{subjects.all_commands(service, name)}",
            f"$JS.API.CONSUMER.INFO.CMD.{consumer}",
            f"$JS.API.CONSUMER.MSG.NEXT.CMD.{consumer}",
            f"$JS.ACK.CMD.{consumer}.>",
        ]
    subscribe = [
        f"{inbox}.>",
        *(subjects.all_commands(service, name) for name in names),
        *((f"{ROOT}.svc.{service}.{node}.*", "$SRV.>") if rights.has_endpoints else ()),
        *(f"{ROOT}.{subject}" for subject in rights.subscribes),
    ]
    return Permissions(publish=tuple(publish), subscribe=tuple(subscribe))


def _jetstream(rights: ServiceRights) -> list[str]:
    followed = sorted({"live", *rights.reads})
    return [
        # All services make the streams at start, whoever comes first. Only the operator changes or deletes one.
        *(f"$JS.API.STREAM.{verb}.{stream}" for stream in STREAMS for verb in ("INFO", "CREATE")),
        *(
            pattern
            for bucket in followed
            for pattern in (
                f"$JS.API.DIRECT.GET.KV_{bucket}.>",
                f"$JS.API.CONSUMER.CREATE.KV_{bucket}.>",
                f"$JS.API.CONSUMER.INFO.KV_{bucket}.*",
                f"$JS.API.CONSUMER.DELETE.KV_{bucket}.*",
                f"$JS.FC.KV_{bucket}.>",
            )
        ),
        *(f"$JS.API.{subject}" for subject in rights.api),
    ]


OPERATOR = Permissions(publish=(">",), subscribe=(">",))
"""The operator: who runs the NATS server and admits nodes."""
