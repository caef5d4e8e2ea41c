"""Which models the cluster can serve, and which node has each: what the hub's protocol is answered from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable

import msgspec

from shoal_common.errors import NotFound, Unavailable
from shoal_common.messages.facts import Live
from shoal_common.messages.questions import AskManifest
from shoal_common.messages.records import Manifest, ModelState
from shoal_common.names import ModelRef
from shoal_common.questions import Ask
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

    def __init__(self, node: str, ask: Ask, models: View, live: View) -> None:
        self._node, self._ask, self._models, self._live = node, ask, models, live
        self._manifests: OrderedDict[str, Manifest] = OrderedDict()

    async def find(self, ref: ModelRef) -> Found | None:
        """A model of a live node, this one first. Raises Unavailable when none of those that have it answers."""
        unavailable: Unavailable | None = None
        serving = self._serving
        for state in holders(ref, self._held, serving, self._node):
            try:
                manifest = await self._manifest(state)
            except NotFound:  # deleted a moment ago
                continue
            except Unavailable as e:
                unavailable = e
                continue
            return Found(manifest, "" if state.node == self._node else serving[state.node][0])
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
    def _serving(self) -> dict[str, list[str]]:
        """Nodes whose fileserver is live, this one among them, and their addresses."""
        lives = ((key.partition("."), live) for key, live in self._live.items("", Live))
        found = {node: live.facts.addresses for (node, _, service), live in lives if service == "fileserver"}
        return {node: addresses for node, addresses in found.items() if addresses} | {self._node: []}

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
