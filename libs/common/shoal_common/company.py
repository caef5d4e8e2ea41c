"""Services of another major version: a newcomer is refused by them, and those that meet later ignore each other.

`CompanyView` is a view of `live` that does not show them, so whoever looks there for peers, sources, holders or nodes
to place on finds none of them. `refuse_newcomer` comes before a service claims its key.
"""

from __future__ import annotations

import asyncio

import msgspec

from shoal_common import VERSION
from shoal_common.buckets import LIVE_TTL_S, live_key
from shoal_common.cancelling import ended
from shoal_common.connection import Nats
from shoal_common.errors import BadMessage, OtherVersion
from shoal_common.identity import is_gone, this_host
from shoal_common.logs import Log
from shoal_common.messages import decode
from shoal_common.messages.facts import Holder, Live
from shoal_common.versions import work_together
from shoal_common.watch import View, follow

log = Log("company")

SNAPSHOT_DEADLINE_S = 30.0
SILENT_S = LIVE_TTL_S + 5.0
"""Of a service elsewhere that has died without a word, the key has expired by then."""
_SHOWN = 40


class Other(msgspec.Struct, frozen=True):
    """A live service of another major version."""

    version: str
    holder: Holder
    beats: int = 0
    """How often it has renewed its key since it was first seen: from 1 on it is certainly alive."""


class CompanyView(View):
    """`live`, without services of another major version than ours. Those are in `others`, by key."""

    def __init__(self, version: str = VERSION, quiet: bool = False) -> None:
        super().__init__("live")
        self.others: dict[str, Other] = {}
        self._version, self._quiet = version, quiet

    def apply(self, key: str, value: bytes | None, revision: int = 0) -> None:
        """One change from the server."""
        other = self._other(key, value)
        if other is None:
            self.comings += self.others.pop(key, None) is not None
            super().apply(key, value, revision)
        else:
            before = self.others.get(key)
            self.comings += before is None
            self._note(key, other)
            if before is not None and before.holder.uid == other.holder.uid:
                self.others[key] = msgspec.structs.replace(other, beats=before.beats + 1)
            super().apply(key, None, revision)

    def replace(self, values: dict[str, bytes], revision: int = 0) -> None:
        """A whole new snapshot."""
        found = {key: other for key, value in values.items() if (other := self._other(key, value))}
        self.comings += found.keys() != self.others.keys()
        self.others = {key: other for key, other in self.others.items() if key in found}
        for key, other in found.items():
            self._note(key, other)
        super().replace({key: value for key, value in values.items() if key not in found}, revision)

    def _other(self, key: str, value: bytes | None) -> Other | None:
        if value is None:
            return None
        try:
            live = decode(value, Live)
        except BadMessage:
            return None  # absent for whoever looks, and logged then
        return None if work_together(self._version, live.version) else Other(live.version, live.holder)

    def _note(self, key: str, other: Other) -> None:
        node, before = key.partition(".")[0], self.others.get(key)
        if before is not None and before.holder.uid == other.holder.uid:
            return
        said = self._quiet or any(
            k.partition(".")[0] == node and o.version == other.version for k, o in self.others.items()
        )
        self.others[key] = other
        if not said:
            log.warning(
                "ignoring a node of another major version: it and this one take nothing from each other until one "
                "is updated",
                other_node=node,
                other_version=other.version[:_SHOWN],
                version=self._version,
            )


async def refuse_newcomer(nats: Nats, node: str, service: str, version: str = VERSION) -> None:
    """Raise OtherVersion while a live service of the cluster is of another major version than this one.

    One that has died does not count: it is known to be gone by its pid on this machine, elsewhere by its silence. The
    key that this service will claim is left to the claim.
    """
    view, mine = CompanyView(version, quiet=True), live_key(node, service)
    following = asyncio.create_task(follow(nats, view))
    try:
        await view.complete(SNAPSHOT_DEADLINE_S)
        host, waited, loop = this_host(), False, asyncio.get_running_loop()
        give_up_s = loop.time() + SILENT_S
        while True:
            seen = view.revision
            others = {k: o for k, o in view.others.items() if k != mine and not is_gone(o.holder, host)}
            if not others:
                return
            late = loop.time() >= give_up_s
            for key, other in sorted(others.items()):
                if other.beats or other.holder.host == host or late:
                    raise _refusal(key, other, service, node, version)
            if not waited:
                log.warning("waiting for silent services of another version to expire", keys=",".join(sorted(others)))
            waited = True
            try:
                async with asyncio.timeout_at(give_up_s):
                    await view.reached(seen + 1)
            except TimeoutError:
                continue
    finally:
        await ended(following)


def _refusal(key: str, other: Other, service: str, node: str, version: str) -> OtherVersion:
    their_node, _, their_service = key.partition(".")
    return OtherVersion(
        f"{their_service} of node {their_node} runs Shoal {other.version[:_SHOWN]!r}, and {service} of node {node} "
        f"is {version!r}, another major version: they do not work together. Install one version everywhere; to "
        "update a cluster, `shoal down` on every node, then `shoal up` on each with the new one",
        node=node,
        version=version,
        other_node=their_node,
        other_version=other.version[:_SHOWN],
    )
