"""Select the nodes that a command goes to. Pure."""

from __future__ import annotations

from shoal_common.errors import BadInput, NodeAway
from shoal_common.messages.downloads import ENDED
from shoal_common.messages.storage import ModelState, PartState
from shoal_common.names import ModelRef, check_node
from shoal_gateway.cluster.snapshot import Picture
from shoal_gateway.cluster.status_view import known_nodes

ALL = "all"
Nodes = list[str] | str | None
"""As given in a request: a list, one name, `all`, or nothing."""


def to_download(picture: Picture, nodes: Nodes, own_node: str) -> list[str]:
    """Return the nodes that download: `own_node` by default. Raises NodeDown unless all their fetchers are live."""
    return _live(picture, _named(picture, nodes, "fetcher") or [own_node], "fetcher")


def to_control(picture: Picture, model: str, nodes: Nodes) -> list[str]:
    """Return the nodes that pause, resume or cancel a download ("": any): by default those where it has not ended."""
    chosen = _named(picture, nodes, "fetcher")
    if chosen is None:
        chosen = sorted({d.node for d in picture.downloads if model in ("", d.model) and d.phase not in ENDED})
    return _live(picture, chosen, "fetcher")


def to_delete(picture: Picture, repo: str, revision: str | None, node: str | None) -> list[str]:
    """Return the nodes that delete a revision of a repo (None: all): `node`, or all that hold or download it."""
    if node is not None:
        return _live(picture, [check_node(node)], "storage")
    held: list[ModelState | PartState] = [*picture.models, *picture.parts]
    chosen = {m.node for m in held if m.repo == repo and revision in (None, m.commit, *m.revisions)}
    for d in picture.downloads:
        # An ended download is only a record: it is cleared where storage is live, and blocks nothing elsewhere.
        requested = ModelRef.parse(d.model)
        matches = requested.repo == repo and revision in (None, requested.revision, d.commit)
        if matches and (d.phase not in ENDED or picture.has(d.node, "storage")):
            chosen.add(d.node)
    return _live(picture, sorted(chosen), "storage")


def to_storage(picture: Picture, node: str | None, nodes: Nodes, own_node: str) -> list[str]:
    """Return the nodes whose storage gets the command: `own_node` by default. `node` may be `all` too."""
    if node is not None and nodes is not None:
        raise BadInput("`node` and `nodes` mean the same: give one of them", param="node")
    return _live(picture, _named(picture, nodes if node is None else node, "storage") or [own_node], "storage")


def _named(picture: Picture, nodes: Nodes, service: str) -> list[str] | None:
    if nodes is None:
        return None
    if nodes == ALL:
        live = picture.nodes_with(service)
        if not live:
            raise NodeAway(f"no node runs a {service}; start a node with `shoal up`")
        return live
    names = [nodes] if isinstance(nodes, str) else nodes
    if not names:
        raise BadInput('`nodes` is empty: name nodes, give "all", or leave it out', param="nodes")
    return list(dict.fromkeys(check_node(n) for n in names))


def _live(picture: Picture, nodes: list[str], service: str) -> list[str]:
    down = [n for n in nodes if not picture.has(n, service)]
    if down:
        raise NodeAway(
            f"{', '.join(_down_reason(picture, n, service) for n in down)}; nothing was sent: start the node with "
            f"`shoal up` there, or leave it out (nodes with a running {service}: "
            f"{', '.join(picture.nodes_with(service)) or 'none'})",
            nodes=down,
        )
    return nodes


def _down_reason(picture: Picture, node: str, service: str) -> str:
    if picture.live.get(node):
        return f"the {service} of node {node} is down"
    return f"node {node} is down" if node in known_nodes(picture) else f"there is no node {node}"
