"""`pull`, `pause`, `resume`, `cancel`, `rm`, `place`, `run` and `stop` against a real HTTP server."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shoal_cli.cli import run
from shoal_common.errors import (
    BY_CODE,
    Denied,
    HubUnavailable,
    NodeDown,
    NoMemory,
    NotFound,
    QuotaExceeded,
    ShoalError,
    StageLost,
)
from tests.cli.conftest import Node
from tests.cli.fake_gateway import MODEL, Cluster, download, held, instance, lacking
from tests.cli.unit.test_commands import Capture, one_line


def test_pull_shows_progress_until_the_commands_outcome(cluster: Cluster, capsys: Capture) -> None:
    cluster.downloads = [
        # What an earlier request left: it must not be taken for the end of this one.
        [download("ready", 1000)],
        [download("queued")],
        [download("fetching", 100, waiting_for="origin node-b")],
        [download("fetching", 500, sources={"hub": 100, "node-b": 400}, speed_bytes_per_s=50.0, eta_s=10.0)],
        [download("blocked", 600, waiting_for="disk full: 400 B more needed, 0 B free")],
        [download("verifying", 1000)],
        [download("ready", 1000)],
    ]
    cluster.outcomes["c1"] = {"ok": True}
    assert run(["pull", MODEL]) == 0
    output = capsys.readouterr().out.splitlines()
    assert output == [
        "node-a: 100 %, 1.0 kB of 1.0 kB, ready",
        "node-a: 0 %, 0 B of 1.0 kB, queued",
        "node-a: 10 %, 100 B of 1.0 kB, waiting for origin node-b",
        "node-a: 50 %, 500 B of 1.0 kB, 50 B/s, 10 s left, from node-b, hub",
        "node-a: 60 %, 600 B of 1.0 kB, blocked: disk full: 400 B more needed, 0 B free",
        "node-a: 100 %, 1.0 kB of 1.0 kB, verifying",
        "node-a: 100 %, 1.0 kB of 1.0 kB, ready",
        "org/fish is ready on node-a",
    ]
    assert cluster.asked("POST", "/v1/downloads") == [{"model": MODEL}]


def test_pull_sends_the_request_to_the_named_nodes(cluster: Cluster, capsys: Capture) -> None:
    run(["pull", MODEL, "--node", "node-b", "--node", "node-c", "--no-wait"])
    run(["pull", f"{MODEL}@v1", "--all", "--force", "--no-wait"])
    assert cluster.asked("POST", "/v1/downloads") == [
        {"model": MODEL, "nodes": ["node-b", "node-c"]},
        {"model": f"{MODEL}@v1", "nodes": "all", "force": True},
    ]
    assert (
        capsys.readouterr().out.splitlines()[0] == "requested org/fish on node-a; `shoal status` shows its progress"
    )


def test_pull_as_json_prints_the_final_state_only(cluster: Cluster, capsys: Capture) -> None:
    cluster.downloads = [[download("fetching", 5)], [download("ready", 1000)]]
    cluster.outcomes["c1"] = {"ok": True}
    assert run(["pull", MODEL, "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out) == {"downloads": [download("ready", 1000)], "commands": {"node-a": "c1"}}
    assert output.err == ""


def test_a_failed_pull_ends_with_the_nodes_error_and_exit_code(cluster: Cluster, capsys: Capture) -> None:
    cluster.downloads = [[download("rejected")]]
    error = {"code": QuotaExceeded.code, "message": "no room: 5 GB needed, 1 GB free", "details": {}}
    cluster.outcomes["c1"] = {"ok": False, "error": error}
    assert run(["pull", MODEL]) == QuotaExceeded.exit_code
    assert one_line(capsys.readouterr().err) == "shoal: node-a: no room: 5 GB needed, 1 GB free\n"
    assert run(["pull", MODEL, "--json"]) == QuotaExceeded.exit_code
    assert json.loads(capsys.readouterr().out)["downloads"][0]["phase"] == "rejected"


def test_ctrl_c_leaves_a_pull_running_and_prints_that(
    cluster: Cluster, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.downloads = [[download("fetching", 5)]]
    process = subprocess.Popen(
        [sys.executable, "-m", "shoal_cli", "pull", MODEL],
        env=node.environ(SHOAL_GATEWAY=os.environ["SHOAL_GATEWAY"]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert cluster.polled.wait(45)
    process.send_signal(signal.SIGINT)
    _, output = process.communicate(timeout=45)
    assert process.returncode == 130
    assert "the download continues" in output and f"shoal cancel {MODEL}" in output and "Traceback" not in output
    assert cluster.asked("POST", "/v1/downloads/cancel") == []


def test_cancel_rm_and_stop_report_results(cluster: Cluster, capsys: Capture) -> None:
    cluster.models, cluster.instances = [held()], [instance("ready")]
    for command, expected in (
        (["cancel", MODEL], "node-a: org/fish cancelled; what had arrived is deleted"),
        (["rm", MODEL, "--node", "node-a", "--revision", "v1"], "deleted org/fish@v1 on node-a"),
        (["stop", "i1"], "stopped i1"),
    ):
        assert run(command) == 0
        assert capsys.readouterr().out == f"{expected}\n"
    missing = [(["rm", f"{MODEL}@v2"], f"{MODEL}@v2 is on no node"), (["stop", "i2"], "no instance named i2")]
    for command, expected in missing:
        assert run(command) == NotFound.exit_code
        assert expected in one_line(capsys.readouterr().err)
    assert cluster.asked("DELETE", "/v1/models/org/fish") == [
        {"node": "node-a", "revision": "v1"},
        {"revision": "v2"},
    ]


def test_place_waits_until_the_instance_answers(cluster: Cluster, capsys: Capture) -> None:
    cluster.placing = [
        instance("starting", stages=[{"rank": 0, "node": "node-a", "phase": "loading"}]),
        instance("ready"),
    ]
    arguments = ["place", MODEL, "--nodes", "2", "--node", "node-a", "--node", "node-b", "--context", "512"]
    assert run(arguments) == 0
    output = capsys.readouterr()
    assert output.out == "instance i1 is ready on node-a\n"
    assert "starting, node-a loading" in output.err
    request = {"model": MODEL, "wait": False, "min_nodes": 2, "max_nodes": 2, "nodes": ["node-a", "node-b"]}
    assert cluster.asked("POST", "/v1/instances") == [{**request, "context_tokens": 512}]


def test_place_that_fails_ends_with_the_instances_error(cluster: Cluster, capsys: Capture) -> None:
    error = {"code": "no_room", "message": "node-a: 9 GB needed, 4 GB available", "details": {}}
    cluster.placing = [instance("failed", error=error)]
    assert run(["place", MODEL]) == BY_CODE["no_room"].exit_code
    assert "9 GB needed" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("tier", "expected"), [("tight", "y"), ("tight", "yes"), ("tight", ""), ("force", "y"), ("", "y")]
)
def test_low_memory_is_asked_for_at_a_terminal_and_force_never(
    cluster: Cluster, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tier: str, expected: str
) -> None:
    monkeypatch.setattr("sys.stdin", terminal := io.StringIO(f"{expected}\n"))
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    cluster.refuses_once = NoMemory("node-a: 9 GB needed, 4 GB available", **({"tier": tier} if tier else {}))
    cluster.placing = [{**instance("ready"), "tier": "tight"}]
    agreed = tier == "tight" and bool(expected)
    assert run(["place", MODEL]) == (0 if agreed else NoMemory.exit_code)
    output = capsys.readouterr()
    assert ("[y/N]" in output.out) == (tier == "tight") and ("warning: it fits only" in output.err) == agreed
    asked = [body.get("allow_low_memory", False) for body in cluster.asked("POST", "/v1/instances")]
    assert asked == ([False, True] if agreed else [False])


def test_run_with_a_prompt_prints_only_the_answer_on_stdout(cluster: Cluster, capsys: Capture) -> None:
    cluster.models, cluster.instances = [held()], [instance("failed", "i0"), instance("ready")]
    assert run(["run", MODEL, "what do fish say?", "--max-tokens", "9", "--temperature", "0"]) == 0
    output = capsys.readouterr()
    assert (output.out, output.err) == ("Blub blub.\n", "")
    [asked] = cluster.asked("POST", "/v1/chat/completions")
    assert asked["model"] == "i1" and (asked["max_tokens"], asked["temperature"]) == (9, 0)
    assert asked["messages"] == [{"role": "user", "content": "what do fish say?"}]


def test_run_brings_and_places_a_model_that_is_nowhere(
    cluster: Cluster, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.downloads, cluster.outcomes = [[download("ready", 1000)]], {"c1": {"ok": True}}
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    assert run(["run", MODEL, "--nodes", "2"]) == 0
    assert capsys.readouterr().out == "Blub blub.\n"
    assert len(cluster.asked("POST", "/v1/downloads")) == 1
    assert cluster.asked("POST", "/v1/instances") == [{"model": MODEL, "wait": False, "min_nodes": 2, "max_nodes": 2}]
    assert cluster.asked("POST", "/v1/chat/completions")[0]["messages"][0]["content"] == "from a pipe"


@pytest.mark.parametrize("command", [["pull", MODEL], ["run", MODEL, "hi"]])
def test_a_hub_that_refuses_says_why_your_token_was_not_used(
    cluster: Cluster, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_whoever_pulls")
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "no node"))
    error = {"code": Denied.code, "message": "it is gated", "details": {"source": "hub"}}
    cluster.downloads, cluster.outcomes = [[download("failed")]], {"c1": {"ok": False, "error": error}}
    assert run(command) == Denied.exit_code
    shown = capsys.readouterr().err
    assert "it is gated; your token stays on this machine, which runs no node" in shown and "hf_of" not in shown


def test_run_waits_for_an_instance_that_is_on_its_way(cluster: Cluster, capsys: Capture) -> None:
    cluster.instances, cluster.placing = [instance("starting")], [instance("starting"), instance("ready")]
    assert run(["run", MODEL, "hi"]) == 0
    assert cluster.asked("POST", "/v1/instances") == []


def test_run_moves_an_instance_whose_node_is_gone(cluster: Cluster, capsys: Capture) -> None:
    cluster.instances, cluster.placing = [lacking("degraded")], [instance("starting"), instance("ready")]
    assert run(["run", MODEL, "hi"]) == 0
    output = capsys.readouterr()
    assert (
        output.out == "Blub blub.\n"
        and "node node-b is down since 1970-01-02T00:00:00+00:00: moving it" in output.err
    )
    assert cluster.asked("POST", "/v1/instances/i1/rebalance") == [{}]
    assert cluster.asked("POST", "/v1/instances") == []


def test_run_places_again_what_its_own_constraints_hold(cluster: Cluster, capsys: Capture) -> None:
    cluster.instances, cluster.placing = [lacking("degraded")], [instance("ready", "i2")]
    cluster.refuses_once = NoMemory("needs 2 nodes; 1 available")
    assert run(["run", MODEL, "hi"]) == 0
    assert cluster.asked("POST", "/v1/instances") == [{"model": MODEL, "wait": False}]
    assert cluster.asked("POST", "/v1/chat/completions")[0]["model"] == "i2"


@pytest.mark.parametrize("command", [["run", MODEL, "hi"], ["place", MODEL]])
def test_what_cannot_run_without_a_node_fails_and_names_it(
    cluster: Cluster, capsys: Capture, command: list[str]
) -> None:
    cluster.instances, cluster.placing = [lacking("degraded")], [lacking("starting")]
    assert run(command) == NodeDown.exit_code
    assert "node node-b is down since 1970-01-02T00:00:00+00:00" in capsys.readouterr().err


def test_run_prefers_an_instance_that_lacks_no_node(cluster: Cluster, capsys: Capture) -> None:
    cluster.instances, cluster.placing = [lacking("degraded"), instance("starting", "i2")], [instance("ready", "i2")]
    assert run(["run", MODEL, "hi"]) == 0
    assert cluster.asked("POST", "/v1/instances/i1/rebalance") == []


@pytest.mark.parametrize("error", [StageLost("stage 1 is lost"), HubUnavailable("the hub is away")])
def test_an_answer_that_fails_in_its_middle_ends_with_that_error(
    cluster: Cluster, capsys: Capture, error: ShoalError
) -> None:
    cluster.instances, cluster.fails_mid_answer = [instance("ready")], error
    assert run(["run", MODEL, "hi"]) == error.exit_code
    output = capsys.readouterr()
    assert output.out == "Blub blub."
    assert one_line(output.err) == f"shoal: {error.message}\n"


def test_an_answer_that_breaks_off_is_not_taken_for_complete(cluster: Cluster, capsys: Capture) -> None:
    cluster.instances, cluster.finish = [instance("ready")], False
    assert run(["run", MODEL, "hi"]) == 5
    assert "broke off before its end" in one_line(capsys.readouterr().err)


def test_pause_resume_and_cancel_report_each_downloads_phase(cluster: Cluster, capsys: Capture) -> None:
    assert run(["pause", MODEL, "--all"]) == 0
    output = capsys.readouterr().out.splitlines()
    assert output == [
        "node-a: org/fish is paused; its bytes are kept, and `shoal resume org/fish` continues it",
        "node-a: org/other was already paused",
    ]
    assert run(["resume", MODEL, "--node", "node-a"]) == 0
    assert "was rejected and is not retried: `shoal pull org/fish` requests it again" in capsys.readouterr().out
    assert run(["pause", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nodes"]["node-a"]["models"][MODEL] == "paused"
    assert cluster.asked("POST", "/v1/downloads/pause") == [{"model": MODEL, "nodes": "all"}, {"model": ""}]
    assert cluster.asked("POST", "/v1/downloads/resume") == [{"model": MODEL, "nodes": ["node-a"]}]


def test_a_pull_that_somebody_pauses_ends_with_a_message(cluster: Cluster, capsys: Capture) -> None:
    cluster.downloads = [[download("fetching", 100)], [download("paused", 400, resumed_bytes=400)]]
    error = {"code": "paused", "message": "the download of org/fish is paused on node node-a"}
    cluster.outcomes["c1"] = {"ok": False, "error": error}
    assert run(["pull", MODEL]) == 4
    output = capsys.readouterr()
    assert "node-a: the download of org/fish is paused" in output.err
    assert "40 %, 400 B of 1.0 kB, resumed from 40 %, paused: `shoal resume org/fish`" in output.out
