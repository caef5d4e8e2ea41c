"""Which models the cluster can serve, and which node has each: what the hub's protocol is answered from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable

import msgspec

from shoal_common.errors import NotFound, Unavailable
from shoal_common.interfaces import Interfaces
from shoal_common.messages.facts import Link, Live
from shoal_common.messages.questions import AskManifest
from shoal_common.messages.records import Manifest, ModelState
from shoal_common.names import ModelRef
from shoal_common.questions import Ask
from shoal_common.reach import facing
from shoal_common.watch import View

_KEPT = 64
"""Manifests kept in memory. A commit's never changes."""
_DEADLINE_S = 10.0


class Found(msgspec.Struct, frozen=True):
    """A model, and where its bytes are: "" here, else `host:port` of a node that has all of them."""

    manifest: Manifest
    address: str


class Catalog:
    """Looks models up in what nodes say of themselves."""

    def __init__(self, node: str, ask: Ask, models: View, live: View, interfaces: Interfaces) -> None:
        self._node, self._ask, self._models, self._live = node, ask, models, live
        self._interfaces = interfaces
        self._manifests: OrderedDict[str, Manifest] = OrderedDict()

    async def find(self, ref: ModelRef, came_to: str) -> Found | None:
        """A model of a live node, this one first. Raises Unavailable when none of those that have it answers.

        `came_to` is the address of ours that is asked: of another node's, the one on the same wire is given.
        """
        unavailable: Unavailable | None = None
        mine = self._interfaces.now
        facings = {node: facing(links, came_to, mine) for node, links in self._serving.items()}
        serving = {node: link.address for node, link in facings.items() if link} | {self._node: ""}
        for state in holders(ref, self._held, serving, self._node):
            try:
                manifest = await self._manifest(state)
            except NotFound:  # deleted a moment ago
                continue
            except Unavailable as e:
                unavailable = e
                continue
            return Found(manifest, serving[state.node])
        if unavailable:
            raise unavailable
        return None

    def knows(self, repo: str) -> bool:
        """Whether any revision of a repository is held by a node that serves."""
        return any(m.repo == repo and m.node in self._serving for m in self._held)

    @property
    def _held(self) -> list[ModelState]:
        return [m for _, m in self._models.items("model.", ModelState)]

    @property
    def _serving(self) -> dict[str, list[Link]]:
        """Nodes whose fileserver is live, this one among them, and how they are reached."""
        lives = ((key.partition("."), live.facts) for key, live in self._live.items("", Live))
        found = {
            node: facts.links or [Link(address=a) for a in facts.addresses]
            for (node, _, service), facts in lives
            if service == "fileserver"
        }
        return {node: links for node, links in found.items() if links} | {self._node: []}

    async def _manifest(self, state: ModelState) -> Manifest:
        known = self._manifests.get(state.model)
        if known is None:
            question = AskManifest(model=state.model)
            known = await self._ask("storage", state.node, "manifest", question, Manifest, deadline_s=_DEADLINE_S)
            if known.model != state.model:
                raise NotFound(f"node {state.node} gave another manifest than that of {state.model}")
            self._manifests[state.model] = known
            if len(self._manifests) > _KEPT:
                self._manifests.popitem(last=False)
        self._manifests.move_to_end(state.model)
        return known


def holders(ref: ModelRef, held: Iterable[ModelState], serving: Container[str], me: str) -> list[ModelState]:
    """The serving nodes that have what is meant by `ref`, this one first. Pure.

    Nodes may hold different commits under one name: the one that came last is meant, wherever it is.
    """
    found = [m for m in held if m.repo == ref.repo and ref.revision in (m.commit, *m.revisions) and m.node in serving]
    newest = max(found, key=lambda m: (m.ready_at_s, m.commit), default=None)
    same = [m for m in found if newest and m.commit == newest.commit]
    return sorted(same, key=lambda m: (m.node != me, m.node))
