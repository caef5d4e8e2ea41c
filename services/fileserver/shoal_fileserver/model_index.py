"""Which models the cluster can serve, and which nodes hold each; the hub's protocol is answered from it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable

import msgspec

from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.errors import NotFound, Unavailable
from shoal_common.host.addresses import address_for_caller
from shoal_common.host.interfaces import InterfaceMonitor
from shoal_common.identity.peer_links import PeerLinks
from shoal_common.messages.liveness import LivenessRecord, NodeAddress
from shoal_common.messages.manifest import Manifest
from shoal_common.messages.storage import GetManifest, ModelState
from shoal_common.names import ModelRef
from shoal_common.rpc.request_reply import RpcClient

_MAX_MANIFESTS = 64
"""Manifests cached in memory. A commit's never changes."""
_MANIFEST_TIMEOUT_S = 10.0


class ModelLocation(msgspec.Struct, frozen=True):
    """A model, and a node that has all of its bytes: `link` is None for this one."""

    manifest: Manifest
    node: str
    link: NodeAddress | None


class ModelIndex:
    """Finds models in what nodes publish."""

    def __init__(
        self,
        node: str,
        rpc: RpcClient,
        models: KvMirror,
        live: KvMirror,
        interfaces: InterfaceMonitor,
        peer_links: PeerLinks,
    ) -> None:
        self._node, self._rpc, self._models, self._live = node, rpc, models, live
        self._interfaces, self._peer_links = interfaces, peer_links
        self._manifests: OrderedDict[str, Manifest] = OrderedDict()

    async def find(self, ref: ModelRef, server_address: str) -> ModelLocation | None:
        """Return a model of a live node, preferring this one. Raises Unavailable if no node that holds it answers.

        `server_address`: at which this node was called; of another node, the address on the same link is
        returned.
        """
        unavailable: Unavailable | None = None
        interfaces = self._interfaces.current
        links = {
            node: address_for_caller(node_links, server_address, interfaces)
            for node, node_links in self._serving.items()
        }
        serving = {node for node, link in links.items() if link} | {self._node}
        for state in holders(ref, self._local_models, serving, self._node):
            try:
                manifest = await self._manifest(state)
            except NotFound:  # just deleted
                continue
            except Unavailable as e:
                unavailable = e
                continue
            return ModelLocation(manifest, state.node, links[state.node])
        if unavailable:
            raise unavailable
        return None

    def holds(self, repo: str) -> bool:
        """Return whether any serving node holds a revision of this repository."""
        return any(m.repo == repo and m.node in self._serving for m in self._local_models)

    @property
    def _local_models(self) -> list[ModelState]:
        return [m for _, m in self._models.items("model.", ModelState)]

    @property
    def _serving(self) -> dict[str, list[NodeAddress]]:
        """Nodes with a live fileserver that serves others, this one included, and the links that may be used."""
        services = ((key.partition("."), live.facts) for key, live in self._live.items("", LivenessRecord))
        serving = {
            node: self._peer_links.usable(facts.links or [NodeAddress(address=a) for a in facts.addresses])
            for (node, _, service), facts in services
            if service == "fileserver" and facts.serves_peers
        }
        return {node: links for node, links in serving.items() if links} | {self._node: []}

    async def _manifest(self, state: ModelState) -> Manifest:
        manifest = self._manifests.get(state.model)
        if manifest is None:
            request = GetManifest(model=state.model)
            manifest = await self._rpc(
                "storage", state.node, "manifest", request, Manifest, deadline_s=_MANIFEST_TIMEOUT_S
            )
            if manifest.model != state.model:
                raise NotFound(f"node {state.node} returned another manifest than that of {state.model}")
            self._manifests[state.model] = manifest
            if len(self._manifests) > _MAX_MANIFESTS:
                self._manifests.popitem(last=False)
        self._manifests.move_to_end(state.model)
        return manifest


def holders(ref: ModelRef, held: Iterable[ModelState], serving: Container[str], own_node: str) -> list[ModelState]:
    """Return the serving nodes' states of the model that `ref` means, this node's first. Pure.

    Nodes may hold different commits under one revision: the latest one counts, wherever it is.
    """
    matching = [
        m for m in held if m.repo == ref.repo and ref.revision in (m.commit, *m.revisions) and m.node in serving
    ]
    newest = max(matching, key=lambda m: (m.ready_at_s, m.commit), default=None)
    of_newest = [m for m in matching if newest and m.commit == newest.commit]
    return sorted(of_newest, key=lambda m: (m.node != own_node, m.node))
