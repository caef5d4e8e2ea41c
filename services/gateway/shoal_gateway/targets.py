"""Which nodes a command goes to. Pure."""

from __future__ import annotations

from shoal_common.errors import BadInput, NodeAway
from shoal_common.messages.records import ENDED, ModelState, PartState
from shoal_common.names import ModelRef, check_node
from shoal_gateway.picture import Picture

ALL = "all"
Nodes = list[str] | str | None
"""As people give them: a list, one name, `all`, or nothing."""


def to_download(picture: Picture, nodes: Nodes, here: str) -> list[str]:
    """Where to download: `here` when nothing is said. Raises NodeAway unless every one's fetcher is live."""
    return _live(picture, _named(picture, nodes, "fetcher") or [here], "fetcher")


def to_control(picture: Picture, model: str, nodes: Nodes) -> list[str]:
    """Where to pause, resume or cancel a download (any: ""): where it has not ended, when nothing is said."""
    chosen = _named(picture, nodes, "fetcher")
    if chosen is None:
        chosen = sorted({d.node for d in picture.downloads if model in ("", d.model) and d.phase not in ENDED})
    return _live(picture, chosen, "fetcher")


def to_delete(picture: Picture, repo: str, revision: str | None, node: str | None) -> list[str]:
    """Where to delete a revision of a repo (None: all of them): `node`, or every node that holds or downloads it."""
    if node is not None:
        return _live(picture, [check_node(node)], "storage")
    held: list[ModelState | PartState] = [*picture.models, *picture.parts]
    chosen = {m.node for m in held if m.repo == repo and revision in (None, m.commit, *m.revisions)}
    for d in picture.downloads:
        # An ended download is only a record: it is cleared where somebody can, and holds nobody up elsewhere.
        wanted = ModelRef.parse(d.model)
        meant = wanted.repo == repo and revision in (None, wanted.revision, d.commit)
        if meant and (d.phase not in ENDED or picture.has(d.node, "storage")):
            chosen.add(d.node)
    return _live(picture, sorted(chosen), "storage")


def to_storage(picture: Picture, node: str | None, nodes: Nodes, here: str) -> list[str]:
    """Whose storage is meant: `here` when nothing is said. `node` may be `all` too."""
    if node is not None and nodes is not None:
        raise BadInput("`node` and `nodes` say the same: give one of them", param="node")
    return _live(picture, _named(picture, nodes if node is None else node, "storage") or [here], "storage")


def _named(picture: Picture, nodes: Nodes, service: str) -> list[str] | None:
    if nodes is None:
        return None
    if nodes == ALL:
        found = picture.nodes_with(service)
        if not found:
            raise NodeAway(f"no node's {service} is live; start a node with `shoal up`")
        return found
    named = [nodes] if isinstance(nodes, str) else nodes
    if not named:
        raise BadInput('`nodes` is empty: name nodes, say "all", or leave it out', param="nodes")
    return list(dict.fromkeys(check_node(n) for n in named))


def _live(picture: Picture, nodes: list[str], service: str) -> list[str]:
    away = [n for n in nodes if not picture.has(n, service)]
    if away:
        raise NodeAway(
            f"{service} of node {', '.join(away)} is not live; nothing was sent: bring the node back with "
            f"`shoal up` there, or leave it out (live: {', '.join(picture.nodes_with(service)) or 'none'})",
            nodes=away,
        )
    return nodes
