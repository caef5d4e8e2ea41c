"""Names as people type them: short ones are resolved, unknown ones are errors that name the nearest."""

from __future__ import annotations

from typing import Any

import pytest

from shoal_cli.cli import run
from shoal_common.errors import BadInput, NotFound
from tests.cli.fake_gateway import COMMIT, MODEL, Cluster, download, held, instance

Capture = pytest.CaptureFixture[str]
LONG = "mlx-community/DeepSeek-V3-4bit"


@pytest.fixture
def sea(cluster: Cluster) -> Cluster:
    """A cluster that holds, downloads and runs models."""
    cluster.models = [
        held(),
        held(repo=LONG, model=f"{LONG}@{COMMIT}"),
        held(repo="org/eel", model=f"org/eel@{COMMIT}"),
    ]
    cluster.models.append(held(repo="other/eel", model=f"other/eel@{COMMIT}"))
    cluster.downloads = [[download("fetching", model="sea/crab"), download("failed", model="pond/fish")]]
    cluster.instances = [
        instance("ready"),
        instance("ready", "i2", repo="org/eel"),
        instance("ready", "i3", repo="org/eel"),
    ]
    return cluster


@pytest.mark.parametrize(
    ("arguments", "code", "hint"),
    [
        (["stop", "deepseek"], 3, "no instance named deepseek: `shoal ps` lists"),
        (["stop", "fsh"], 3, f"no instance named fsh: did you mean {MODEL}?"),
        (["stop", "eel"], 2, "eel has several instances: give the id of one: i2 (org/eel on node-a), i3"),
        (["stop", "a/b"], 3, "no instance named a/b"),
        (["rebalance", "i9"], 3, "`shoal ps` lists the instances"),
        (["rm", "deepsek"], 3, "no model named deepsek: did you mean"),
        (["rm", "eel"], 2, "eel is ambiguous: write org/eel or other/eel"),
        (["pull", "crap"], 3, "no model named crap: did you mean sea/crab?"),
        (["pull", "whale"], 3, "write org/name for one that is not here yet"),
        (["run", "deepseek", "hi"], 3, f"did you mean {LONG}?"),
        (["place", "deepseek"], 3, f"did you mean {LONG}?"),
        (["place", MODEL, "--node", "node-x"], 3, "no node named node-x: did you mean node-a or node-b?"),
        (["place", MODEL, "--without", "node-x"], 3, "no node named node-x"),
        (["storage", "unpin", "org/fisch"], 3, f"no model named org/fisch: did you mean {MODEL}"),
        (["node", "drain", "node-x"], 3, "no node named node-x"),
        (["node", "drain", "node-x", "--undo"], 3, "no node named node-x"),
        (["hub", "--node", "node-x"], 3, "no node named node-x: did you mean"),
        (["verify", "fisch"], 3, f"did you mean {MODEL}"),
        (["repair", "fisch"], 3, f"did you mean {MODEL}"),
        (["cancel", "fisch"], 3, f"did you mean {MODEL}"),
    ],
)
def test_a_name_that_nothing_has_is_an_error_with_the_nearest(
    sea: Cluster, capsys: Capture, arguments: list[str], code: int, hint: str
) -> None:
    sea.disk_results = {"node-a": {"models": []}}
    assert run(arguments) == code
    assert hint in capsys.readouterr().err
    changed = [(method, path) for method, path, _ in sea.requests if method in ("POST", "PUT", "DELETE")]
    assert changed in ([], [("POST", "/v1/storage/pins")])


def test_an_absent_model_or_node_is_told_after_the_delete(sea: Cluster, capsys: Capture) -> None:
    sea.models = []
    assert run(["rm", "org/fishh"]) == NotFound.exit_code
    assert f"no model named org/fishh: did you mean {MODEL}" in capsys.readouterr().err
    assert run(["node", "forget", "node-q"]) == NotFound.exit_code
    assert "no node named node-q: did you mean node-a or node-b?" in capsys.readouterr().err
    assert [path for method, path, _ in sea.requests if method == "DELETE"] == [
        "/v1/models/org/fishh",
        "/v1/nodes/node-q",
    ]


@pytest.mark.parametrize("verb", ["cancel", "pause", "resume"])
def test_a_download_that_nobody_knows_is_an_error(sea: Cluster, capsys: Capture, verb: str) -> None:
    sea.controlled = {"models": {"org/crabb": "unknown"}, "cancelled": False, "was": "unknown"}
    assert run([verb, "org/crabb"]) == NotFound.exit_code
    assert "no model named org/crabb: did you mean sea/crab?" in capsys.readouterr().err
    # Held, and not being downloaded: as it should be.
    sea.controlled = {"models": {MODEL: "unknown"}, "cancelled": False, "was": "unknown"}
    assert run([verb, MODEL]) == 0
    assert "is not being downloaded" in capsys.readouterr().out


def test_events_of_an_unknown_node_are_an_error(sea: Cluster, capsys: Capture) -> None:
    assert run(["events", "--node", "node-x"]) == NotFound.exit_code
    assert "no node named node-x: did you mean" in capsys.readouterr().err
    assert run(["events", "--node", "node-b"]) == 0
    assert capsys.readouterr().err == "no events\n"


@pytest.mark.parametrize(
    ("arguments", "method", "path", "model"),
    [
        (["rm", "DeepSeek-V3-4bit"], "DELETE", f"/v1/models/{LONG}", None),
        (["rm", "DeepSeek-V3-4bit@main"], "DELETE", f"/v1/models/{LONG}", None),
        (["stop", "fish"], "DELETE", "/v1/instances/i1", None),
        (["stop", MODEL], "DELETE", "/v1/instances/i1", None),
        (["stop", f"fish@{COMMIT}"], "DELETE", "/v1/instances/i1", None),
        (["pull", "crab", "--no-wait"], "POST", "/v1/downloads", "sea/crab"),
        (["place", "fish"], "POST", "/v1/instances", MODEL),
        (["pause", "crab"], "POST", "/v1/downloads/pause", "sea/crab"),
        (["cancel", "crab"], "POST", "/v1/downloads/cancel", "sea/crab"),
        (["storage", "pin", "fish"], "POST", "/v1/storage/pins", MODEL),
        (["verify", f"fish@{COMMIT}"], "POST", "/v1/storage/verify", f"{MODEL}@{COMMIT}"),
        (["repair", "fish"], "POST", "/v1/storage/verify", MODEL),
    ],
)
def test_a_short_name_is_the_one_model_of_the_cluster(
    sea: Cluster, arguments: list[str], method: str, path: str, model: str | None
) -> None:
    sea.disk_results = {"node-a": {} if arguments[0] == "verify" else {"models": [MODEL]}}
    assert run(arguments) == 0
    bodies: list[Any] = sea.asked(method, path)
    assert len(bodies) == 1
    assert model is None or bodies[0]["model"] == model


def test_an_ambiguous_short_name_names_the_candidates(sea: Cluster, capsys: Capture) -> None:
    assert run(["run", "eel", "hi"]) == BadInput.exit_code
    assert capsys.readouterr().err == "shoal: eel is ambiguous: write org/eel or other/eel\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["fish", "--nodes", "1", "why do fish swim"],
        ["--nodes", "1", "fish", "why do fish swim"],
        ["fish", "why do fish swim", "--nodes", "1"],
        ["fish", "why", "do", "--nodes", "1", "fish", "swim"],
    ],
)
def test_run_takes_options_and_arguments_in_any_order(sea: Cluster, capsys: Capture, arguments: list[str]) -> None:
    assert run(["run", *arguments]) == 0
    assert capsys.readouterr().out == "Blub blub.\n"
    [body] = sea.asked("POST", "/v1/chat/completions")
    assert (body["model"], body["messages"]) == ("i1", [{"role": "user", "content": "why do fish swim"}])


def test_run_over_two_nodes_takes_no_instance_on_one(sea: Cluster, capsys: Capture) -> None:
    sea.placing = [instance("ready", "i7", nodes=["node-a", "node-b"])]
    assert run(["run", MODEL, "--nodes", "2", "hello"]) == 0
    [placed] = sea.asked("POST", "/v1/instances")
    assert (placed["min_nodes"], placed["max_nodes"]) == (2, 2)
    [body] = sea.asked("POST", "/v1/chat/completions")
    assert body["model"] == "i7"
