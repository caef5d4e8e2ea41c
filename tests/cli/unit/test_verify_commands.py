"""`verify` and `repair`: what they print, and their exit codes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shoal_cli.cli import run
from shoal_common.errors import Corrupt, HubUnavailable
from tests.cli.fake_gateway import COMMIT, MODEL, Cluster, download

Capture = pytest.CaptureFixture[str]
GB = 10**9
HELD = f"{MODEL}@{COMMIT}"


def test_verify_ends_with_0_only_when_all_is_intact(cluster: Cluster, capsys: Capture) -> None:
    cluster.disk_results = {"node-a": {"checked": 1, "checked_bytes": 2 * GB}}
    assert run(["verify"]) == 0
    assert capsys.readouterr().out == "node-a: verified 1 blob, 2.0 GB: all intact\n"
    found = {"corrupt": ["ab" * 32], "missing": ["cd" * 32], "models": [HELD], "instances": ["i1"]}
    cluster.disk_results = {"node-a": {"checked": 3, "checked_bytes": 2 * GB, **found}}
    assert run(["verify", MODEL, "--node", "node-a"]) == Corrupt.exit_code
    assert capsys.readouterr().out.splitlines() == [
        "node-a: verified 3 blobs, 2.0 GB: 1 corrupt and in quarantine, 1 missing",
        f"  {HELD} is incomplete: `shoal repair {HELD} --node node-a` repairs it",
        "  instance i1 may have loaded corrupt bytes: `shoal stop i1`",
    ]
    cluster.disk_results = {"node-a": {"checked": 1, "checked_bytes": 2 * GB, "incomplete": [HELD]}}
    assert run(["verify", "--node", "node-a"]) == Corrupt.exit_code, "found corrupt earlier: nothing is left to hash"
    assert capsys.readouterr().out.splitlines() == [
        "node-a: verified 1 blob, 2.0 GB: 1 model incomplete from before",
        f"  {HELD} is incomplete: `shoal repair {HELD} --node node-a` repairs it",
    ]
    assert run(["verify", "--json"]) == Corrupt.exit_code
    assert json.loads(capsys.readouterr().out) == {"nodes": cluster.disk_results}
    assert cluster.asked("POST", "/v1/storage/verify") == [
        {},
        {"node": "node-a", "model": MODEL},
        {"node": "node-a"},
        {},
    ]


def repaired(cluster: Cluster, **outcome: Any) -> None:
    """A node on which two leaves of a blob are bad, and how pulling the model again ends there."""
    found = {"corrupt": ["ab" * 32], "bad_leaves": 2, "models": [HELD], "incomplete": [HELD], "instances": ["i1"]}
    cluster.disk_results = {"node-a": {"checked": 3, "checked_bytes": 2 * GB, **found}}
    phase = "ready" if outcome["ok"] else "failed"
    arriving = download("fetching", 500, model=HELD)
    cluster.downloads = [[arriving], [arriving], [download(phase, 1000, model=HELD, sources={"hub": 2_097_152})]]
    cluster.outcomes = {"c1": outcome}


def test_repair_verifies_pulls_the_incomplete_and_prints_costs(cluster: Cluster, capsys: Capture) -> None:
    repaired(cluster, ok=True)
    assert run(["repair", MODEL, "--node", "node-a"]) == 0
    assert cluster.asked("POST", "/v1/storage/verify") == [{"node": "node-a", "model": MODEL}]
    assert cluster.asked("POST", "/v1/downloads") == [{"model": HELD, "nodes": ["node-a"]}]
    output = capsys.readouterr().out.splitlines()
    assert output[0] == "node-a: verified 3 blobs, 2.0 GB: 1 corrupt and in quarantine (2 corrupt leaves)"
    assert output[-3:] == [
        "node-a: 2 corrupt leaves in 1 blob; fetched 2.1 MB",
        f"  {HELD} is complete again",
        "  instance i1 may have loaded corrupt bytes: `shoal stop i1`",
    ]
    repaired(cluster, ok=True)
    assert run(["repair", "--all", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["nodes"]["node-a"]
    assert (row["bad_leaves"], row["repaired"], row["fetched_bytes"], row["errors"]) == (2, [HELD], 2_097_152, {})


def test_repair_fetches_nothing_where_all_is_complete(cluster: Cluster, capsys: Capture) -> None:
    cluster.disk_results = {"node-a": {"checked": 1, "checked_bytes": 2 * GB}}
    assert run(["repair"]) == 0
    assert not cluster.asked("POST", "/v1/downloads")
    assert capsys.readouterr().out == ("node-a: verified 1 blob, 2.0 GB: all intact\nnode-a: nothing to repair\n")


def test_a_model_that_cannot_be_repaired_sets_the_exit_code(cluster: Cluster, capsys: Capture) -> None:
    repaired(cluster, ok=False, error={"code": "hub_unavailable", "message": "the hub does not answer"})
    assert run(["repair", MODEL]) == HubUnavailable.exit_code
    assert f"  {HELD} is still incomplete: the hub does not answer" in capsys.readouterr().out.splitlines()
