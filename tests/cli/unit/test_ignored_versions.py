"""What a person sees of a node that is ignored for its version."""

from __future__ import annotations

from rich.console import Console

from shoal_cli.render.tables import render_status
from shoal_common.messages.views import NodeView, StatusView


def test_status_shows_an_ignored_nodes_version_and_our_own() -> None:
    theirs = NodeView(node="b", live=False, other_versions={"storage": "0.4.0", "fetcher": "0.4.0"})
    console = Console(width=200)
    with console.capture() as shown:
        console.print(render_status(StatusView(node="a", version="0.3.2", nodes=[theirs])))
    assert "ignored: runs Shoal 0.4.0, this is 0.3.2" in shown.get()
