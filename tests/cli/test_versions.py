"""What a person sees of a node that is ignored for its version."""

from __future__ import annotations

from rich.console import Console

from shoal_cli.client.answers import NodeRow, StatusAnswer
from shoal_cli.client.tables import status_page


def test_status_says_of_an_ignored_node_which_version_it_runs_and_which_this_is() -> None:
    theirs = NodeRow(node="b", live=False, other_versions={"storage": "0.4.0", "fetcher": "0.4.0"})
    console = Console(width=200)
    with console.capture() as shown:
        console.print(status_page(StatusAnswer(node="a", version="0.3.2", nodes=[theirs])))
    assert "ignored: runs Shoal 0.4.0, this is 0.3.2" in shown.get()
