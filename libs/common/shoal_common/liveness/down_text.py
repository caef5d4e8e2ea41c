"""That a node is down, for people. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime


def down_text(node: str, since_s: float) -> str:
    """Return that a node is down, for people, with the time where it is known (not 0)."""
    if not since_s:
        return f"node {node} is down"
    return f"node {node} is down since {datetime.fromtimestamp(since_s, UTC).isoformat(timespec='seconds')}"


def down_texts(down_since_s: Mapping[str, float]) -> str:
    """Return that several nodes are down, with since when by node."""
    return ", ".join(down_text(node, since_s) for node, since_s in down_since_s.items())
