"""What each service may do on NATS: the table from which the server's configuration and docs are made.

A service of a node reads the cluster's state, writes its own node's keys, answers its own subjects, and calls what
the table names. Two things are left to trust: placement's leader may run on any node, so the placement service of
every node may write what the leader writes; and the key of a stage does not name its node.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from shoal_common.bus import subjects
from shoal_common.bus.subjects import ANY, ROOT
from shoal_common.identity.node_identity import CLI, inbox_prefix
from shoal_common.names import check_node

BUCKETS = ("live", "spec", "state", "lease", "done")
STREAMS = ("CMD", "EVT", *(f"KV_{bucket}" for bucket in BUCKETS))


class Permissions(msgspec.Struct, frozen=True):
    """Subjects that an identity may publish and subscribe to, as NATS patterns. All others are refused."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


class ServiceRights(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the table. `{node}` stands for the service's own node, `*` for any, as in NATS."""

    reads: tuple[str, ...] = ()
    """Buckets whose keys it reads and follows, besides `live`, `spec` and `state`."""
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


_ASKED_BY_PEOPLE = ("storage.*.plan", "placement.*.*", "inference.*.generate", "inference.*.cancel", "*.*.ping")
_READ_EVENTS = (
    "CONSUMER.CREATE.EVT",
    "CONSUMER.CREATE.EVT.>",
    "CONSUMER.INFO.EVT.*",
    "CONSUMER.MSG.NEXT.EVT.*",
    "CONSUMER.DELETE.EVT.*",
)

RIGHTS: dict[str, ServiceRights] = {
    "storage": ServiceRights(
        reads=("done",),
        writes=("state.storage.{node}", "state.model.{node}.*", "state.shard.{node}.*"),
        calls=("fetcher.{node}.stop_downloads",),
        commands=("{node}",),
    ),
    "fetcher": ServiceRights(
        reads=("lease", "done"),
        writes=("spec.download.{node}.*", "state.download.{node}.*", "lease.origin.*"),
        calls=("storage.{node}.*", "storage.*.manifest"),
        commands=("{node}",),
        publishes=("have.{node}.*", "lost.*"),
        subscribes=("have.*.*",),
    ),
    "fileserver": ServiceRights(
        calls=("storage.*.manifest",),
        has_endpoints=False,
    ),
    "placement": ServiceRights(
        reads=("lease", "done"),
        # The leader removes what retired nodes leave behind.
        writes=(
            "spec.leader.placement",
            "spec.instance.*",
            "spec.download.*.*",
            "spec.node.*",
            "state.>",
            "lease.leader.placement",
        ),
        calls=("placement.*.links", "fetcher.*.shape", "*.*.ping"),
        commands=(ANY,),
        publishes=("lost.*",),
        subscribes=("lost.*",),
        api=("STREAM.PURGE.CMD", "CONSUMER.DELETE.CMD.*"),
    ),
    "inference": ServiceRights(
        reads=("done",),
        writes=("state.stage.*.*",),
        calls=("storage.*.record_use", "storage.{node}.lease", "storage.{node}.release_lease"),
        sends=("fetcher.{node}.download",),
        publishes=("tok.*", "lost.*"),
    ),
    "gateway": ServiceRights(
        reads=("done",),
        calls=_ASKED_BY_PEOPLE,
        sends=("*.*.*",),
        has_endpoints=False,
        publishes=("lost.*",),
        subscribes=("tok.*",),
        api=_READ_EVENTS,
    ),
    # People and scripts on the node's own machine: `nats req`, `nats pub`, `shoal doctor`, `shoal leave`.
    CLI: ServiceRights(
        reads=("lease", "done"),
        calls=("*.{node}.*", *_ASKED_BY_PEOPLE),
        sends=("*.*.*",),
        has_endpoints=False,
        publishes=("leave.{node}",),
        subscribes=("tok.*",),
        # Without a name for the consumer: how most libraries follow a bucket.
        api=("INFO", *_READ_EVENTS, *(f"CONSUMER.CREATE.KV_{bucket}" for bucket in BUCKETS)),
    ),
}


def permissions(user: str, node: str) -> Permissions:
    """Return what a user of a node, a service or its `cli`, may publish and subscribe to."""
    service, rights, inbox = user, RIGHTS[user], inbox_prefix(node, user)
    names = [name.format(node=check_node(node)) for name in rights.commands]
    sends = [command.format(node=node) for command in rights.sends]
    publish = [
        # Replies: an inbox cannot be guessed, and only its owner hears it.
        "_INBOX.>",
        *((f"$KV.live.{node}.{service}", f"{ROOT}.evt.{service}.{node}.*") if user != CLI else ()),
        *(f"$KV.{key.format(node=node)}" for key in rights.writes),
        *(f"{ROOT}.svc.{call.format(node=node)}" for call in rights.calls),
        *(f"{ROOT}.cmd.{command}" for command in sends),
        *(f"{ROOT}.{subject.format(node=node)}" for subject in rights.publishes),
        # An outcome is named by its command. A sender cancels there what a service that is down never got.
        *(("$KV.done.*",) if names or sends else ()),
        *_jetstream(rights.reads, rights.api),
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


def invitation_permissions(invitation: str) -> Permissions:
    """Return what the holder of an invitation may do: ask to join, and hear the answer."""
    return Permissions(publish=(subjects.join(invitation),), subscribe=(f"{join_inbox(invitation)}.>",))


def join_inbox(invitation: str) -> str:
    """Return the prefix of the inboxes of an invitation's holder."""
    return f"_INBOX.join.{invitation}"


def _jetstream(buckets: Iterable[str], more: Iterable[str]) -> list[str]:
    # The other two: whether NATS has lost what it stored, and who is a member.
    followed = sorted({"live", "spec", "state", *buckets})
    return [
        *(f"$JS.API.STREAM.INFO.{stream}" for stream in STREAMS),
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
        *(f"$JS.API.{subject}" for subject in more),
    ]


OPERATOR = Permissions(publish=(">",), subscribe=(">",))
"""The operator: who runs the NATS server and admits nodes."""
