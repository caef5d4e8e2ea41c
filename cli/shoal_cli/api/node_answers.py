"""Requests for some of the nodes, and answers that hold a part for each."""

from __future__ import annotations

from typing import Any

import msgspec

from shoal_cli.api.schema import JsonObject
from shoal_common.names import unknown_name


class NodeSelection(msgspec.Struct, frozen=True):
    """The nodes that a command is for: one, all that are up, or the gateway's own."""

    node: str = ""
    all_nodes: bool = False

    def body(self) -> dict[str, Any]:
        """Return the API's parameter; without one the gateway takes its own node."""
        node = "all" if self.all_nodes else self.node
        return {"node": node} if node else {}


def selected_storage(answer: JsonObject, selection: NodeSelection) -> JsonObject:
    """Return the part of GET /v1/storage that a selection means. Raises NotFound."""
    if selection.all_nodes:
        return answer
    node = selection.node or str(answer.get("node", ""))
    nodes = [n for n in answer.get("nodes", []) if n.get("node") == node]
    if not nodes:
        known = [str(n.get("node")) for n in answer.get("nodes", [])]
        raise unknown_name("node with storage", node, known, f"it is on {', '.join(known) or 'no node'}")
    return {**answer, "nodes": nodes}


def by_node(answer: JsonObject, kind: type[Any]) -> list[tuple[str, Any]]:
    """Return each node's part of an answer, as `kind`."""
    return [(node, msgspec.convert(fields, kind)) for node, fields in answer.get("nodes", {}).items()]
