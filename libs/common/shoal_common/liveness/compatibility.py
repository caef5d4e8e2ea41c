"""Which versions work together, and refusing a service that does not fit the cluster."""

from __future__ import annotations

import asyncio
import re

import msgspec

from shoal_common import VERSION
from shoal_common.bus.connection import Nats
from shoal_common.bus.keys import liveness_key
from shoal_common.bus.kv_mirror import KvMirror, follow_forever
from shoal_common.bus.streams import LIVE_TTL_S
from shoal_common.concurrency.cancellation import cancel_and_wait
from shoal_common.errors import BadMessage, OtherVersion
from shoal_common.host.process_identity import host_id, is_dead
from shoal_common.logs import StructuredLogger
from shoal_common.messages import decode
from shoal_common.messages.liveness import LivenessRecord, ProcessIdentity

log = StructuredLogger("compatibility")
SNAPSHOT_TIMEOUT_S = 30.0
DEAD_HOLDER_TIMEOUT_S = LIVE_TTL_S + 5.0
"""By then the key of a service that died elsewhere has expired."""
_MAX_VERSION_CHARACTERS = 40


class IncompatibleService(msgspec.Struct, frozen=True):
    """A live service of another major version."""

    version: str
    holder: ProcessIdentity
    renewals: int = 0
    """Renewals of its key since it was first seen; from 1 on it is certainly alive."""


class CompatibleLiveMirror(KvMirror):
    """A mirror of `live` without services of another major version; those are in `incompatible`, by key."""

    def __init__(self, version: str = VERSION, quiet: bool = False) -> None:
        super().__init__("live")
        self.incompatible: dict[str, IncompatibleService] = {}
        self._version, self._quiet = version, quiet

    def apply(self, key: str, value: bytes | None, revision: int = 0) -> None:
        """Apply one change from the server."""
        other = self._incompatible(key, value)
        if other is None:
            self.key_changes += self.incompatible.pop(key, None) is not None
            super().apply(key, value, revision)
        else:
            known = self.incompatible.get(key)
            self.key_changes += known is None
            self._record(key, other)
            if known is not None and known.holder.uid == other.holder.uid:
                self.incompatible[key] = msgspec.structs.replace(other, renewals=known.renewals + 1)
            super().apply(key, None, revision)

    def replace(self, values: dict[str, bytes], revision: int = 0) -> None:
        """Replace everything with a new snapshot."""
        incompatible = {key: other for key, value in values.items() if (other := self._incompatible(key, value))}
        self.key_changes += incompatible.keys() != self.incompatible.keys()
        self.incompatible = {key: other for key, other in self.incompatible.items() if key in incompatible}
        for key, other in incompatible.items():
            self._record(key, other)
        super().replace({key: value for key, value in values.items() if key not in incompatible}, revision)

    def _incompatible(self, key: str, value: bytes | None) -> IncompatibleService | None:
        if value is None:
            return None
        try:
            live = decode(value, LivenessRecord)
        except BadMessage:
            return None  # absent from the view, which logs it
        return None if are_compatible(self._version, live.version) else IncompatibleService(live.version, live.holder)

    def _record(self, key: str, other: IncompatibleService) -> None:
        node, known = key.partition(".")[0], self.incompatible.get(key)
        if known is not None and known.holder.uid == other.holder.uid:
            return
        logged = self._quiet or any(
            k.partition(".")[0] == node and o.version == other.version for k, o in self.incompatible.items()
        )
        self.incompatible[key] = other
        if not logged:
            log.warning(
                "ignoring a node that runs another major version; install one version everywhere",
                other_node=node,
                other_version=other.version[:_MAX_VERSION_CHARACTERS],
                version=self._version,
            )


async def check_cluster_version(nats: Nats, node: str, service: str, version: str = VERSION) -> None:
    """Raise OtherVersion while a live service of the cluster has another major version than this one.

    A dead service does not count: on this machine its pid tells, elsewhere its expired key. The key that this service
    is about to claim is not looked at.
    """
    live, own_key = CompatibleLiveMirror(version, quiet=True), liveness_key(node, service)
    following = asyncio.create_task(follow_forever(nats, live))
    try:
        await live.wait_loaded(SNAPSHOT_TIMEOUT_S)
        host, waited, loop = host_id(), False, asyncio.get_running_loop()
        give_up_s = loop.time() + DEAD_HOLDER_TIMEOUT_S
        while True:
            seen = live.revision
            others = {k: o for k, o in live.incompatible.items() if k != own_key and not is_dead(o.holder, host)}
            if not others:
                return
            deadline_passed = loop.time() >= give_up_s
            for key, other in sorted(others.items()):
                if other.renewals or other.holder.host == host or deadline_passed:
                    raise _refusal(key, other, service, node, version)
            if not waited:
                log.warning(
                    "waiting for services of another version to renew their key or expire",
                    keys=",".join(sorted(others)),
                )
            waited = True
            try:
                async with asyncio.timeout_at(give_up_s):
                    await live.wait_revision(seen + 1)
            except TimeoutError:
                continue
    finally:
        await cancel_and_wait(following)


def _refusal(key: str, other: IncompatibleService, service: str, node: str, version: str) -> OtherVersion:
    other_node, _, other_service = key.partition(".")
    return OtherVersion(
        f"{other_service} of node {other_node} runs Shoal {other.version[:_MAX_VERSION_CHARACTERS]!r}, and {service} "
        f"of node {node} is {version!r}, another major version: they do not work together. Install one version "
        "everywhere; to update a cluster, `shoal down` on every node, then `shoal up` on each with the new one",
        node=node,
        version=version,
        other_node=other_node,
        other_version=other.version[:_MAX_VERSION_CHARACTERS],
    )


_NUMBER = r"(0|[1-9][0-9]{0,8})"
_SUFFIX = r"[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*"
_VERSION = re.compile(rf"{_NUMBER}\.{_NUMBER}\.{_NUMBER}(?:-{_SUFFIX})?(?:\+{_SUFFIX})?")
_MAX_CHARACTERS = 128


def compatibility_version(version: str) -> str | None:
    """Return what compatible versions have in common: `2`, or `0.3`. None if this is not a version."""
    match = _VERSION.fullmatch(version) if len(version) <= _MAX_CHARACTERS else None
    if match is None:
        return None
    first, second = match.group(1), match.group(2)
    return f"0.{second}" if first == "0" else first


def are_compatible(one: str, other: str) -> bool:
    """Return whether services of these versions may talk to each other."""
    first_version = compatibility_version(one)
    return first_version is not None and first_version == compatibility_version(other)
