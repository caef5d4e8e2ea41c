"""Select the nodes that a command goes to. Pure."""

from __future__ import annotations

from shoal_common.errors import BadInput, NodeDown
from shoal_common.messages.downloads import ENDED_PHASES
from shoal_common.messages.storage import ModelState, ShardState
from shoal_common.names import ModelRef, check_node, unknown_name
from shoal_gateway.cluster.snapshot import ClusterSnapshot
from shoal_gateway.cluster.status_view import known_nodes

ALL_NODES = "all"
NodeSelection = list[str] | str | None
"""As given in a request: a list, one name, `all`, or nothing."""


def select_download_nodes(snapshot: ClusterSnapshot, nodes: NodeSelection, own_node: str) -> list[str]:
    """Return the nodes that download: `own_node` by default. Raises NodeDown unless all their fetchers are live,
    NotFound for a node that is not known."""
    return _live(snapshot, _named(snapshot, nodes, "fetcher") or [own_node], "fetcher")


def select_control_nodes(snapshot: ClusterSnapshot, model: str, nodes: NodeSelection) -> list[str]:
    """Return the nodes that pause, resume or cancel a download ("": any): by default those where it has not ended."""
    chosen = _named(snapshot, nodes, "fetcher")
    if chosen is None:
        chosen = sorted(
            {d.node for d in snapshot.downloads if model in ("", d.model) and d.phase not in ENDED_PHASES}
        )
    return _live(snapshot, chosen, "fetcher")


def select_delete_nodes(snapshot: ClusterSnapshot, repo: str, revision: str | None, node: str | None) -> list[str]:
    """Return the nodes that delete a revision of a repo (None: all): `node`, or all that hold or download it."""
    if node is not None:
        return _live(snapshot, [check_node(node)], "storage")
    copies: list[ModelState | ShardState] = [*snapshot.models, *snapshot.shards]
    chosen = {m.node for m in copies if m.repo == repo and revision in (None, m.commit, *m.revisions)}
    for d in snapshot.downloads:
        # An ended download is only a record: it is cleared where storage is live, and blocks nothing elsewhere.
        requested = ModelRef.parse(d.model)
        matches = requested.repo == repo and revision in (None, requested.revision, d.commit)
        if matches and (d.phase not in ENDED_PHASES or snapshot.is_live(d.node, "storage")):
            chosen.add(d.node)
    return _live(snapshot, sorted(chosen), "storage")


def select_storage_nodes(
    snapshot: ClusterSnapshot, node: str | None, nodes: NodeSelection, own_node: str
) -> list[str]:
    """Return the nodes whose storage gets the command: `own_node` by default. `node` may be `all` too."""
    if node is not None and nodes is not None:
        raise BadInput("`node` and `nodes` mean the same: give one of them", param="node")
    return _live(snapshot, _named(snapshot, nodes if node is None else node, "storage") or [own_node], "storage")


def _named(snapshot: ClusterSnapshot, nodes: NodeSelection, service: str) -> list[str] | None:
    if nodes is None:
        return None
    if nodes == ALL_NODES:
        live = snapshot.live_nodes(service)
        if not live:
            raise NodeDown(f"no node runs a {service}; start a node with `shoal up`")
        return live
    names = [nodes] if isinstance(nodes, str) else nodes
    if not names:
        raise BadInput('`nodes` is empty: name nodes, give "all", or leave it out', param="nodes")
    return list(dict.fromkeys(check_node(n) for n in names))


def _live(snapshot: ClusterSnapshot, nodes: list[str], service: str) -> list[str]:
    down = [n for n in nodes if not snapshot.is_live(n, service)]
    known = known_nodes(snapshot)
    for node in down:
        if node not in known:
            raise unknown_name("node", node, known, f"the nodes are {', '.join(known) or 'none'}")
    if down:
        raise NodeDown(
            f"{', '.join(_down_reason(snapshot, n, service) for n in down)}; nothing was sent: start the node with "
            f"`shoal up` there, or leave it out (nodes with a running {service}: "
            f"{', '.join(snapshot.live_nodes(service)) or 'none'})",
            nodes=down,
        )
    return nodes


def _down_reason(snapshot: ClusterSnapshot, node: str, service: str) -> str:
    if snapshot.live.get(node):
        return f"the {service} of node {node} is down"
    return f"node {node} is down"
