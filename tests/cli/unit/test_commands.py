"""The commands against a real HTTP server: what they ask, what they print, how they end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from starlette.applications import Starlette

from shoal_cli.cli import run
from shoal_common.errors import BY_CODE, BadInput, ShoalError, StageLost
from shoal_common.identity.api_key import ensure_api_key, read_api_key
from tests.cli.fake_gateway import COMMIT, MODEL, Cluster, download, held, instance, lacking

Capture = pytest.CaptureFixture[str]


def one_line(text: str) -> str:
    """A failure's line: exactly one."""
    assert text.startswith("shoal: ") and text.count("\n") == 1 and "Traceback" not in text
    return text


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_every_error_code_becomes_one_line_and_its_exit_code(cluster: Cluster, capsys: Capture, code: str) -> None:
    cluster.fails = BY_CODE[code](f"this is why {code}\nand more")
    assert run(["ls"]) == BY_CODE[code].exit_code
    output = capsys.readouterr()
    assert one_line(output.err) == f"shoal: this is why {code} and more\n"
    assert output.out == ""


def test_an_unknown_error_code_is_a_plain_failure_with_its_text(cluster: Cluster, capsys: Capture) -> None:
    class Later(ShoalError):
        code = "from_the_future"

    cluster.fails = Later("who knows")
    assert run(["ls", "--json"]) == 1
    assert one_line(capsys.readouterr().err) == "shoal: who knows\n"


def test_without_a_node_every_command_shows_how_to_start_one(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path))
    monkeypatch.setenv("SHOAL_GATEWAY_PORT", "9")  # nobody discards here
    monkeypatch.delenv("SHOAL_GATEWAY", raising=False)
    for command in (["status"], ["ls", "--json"], ["pull", MODEL], ["rm", MODEL], ["ps"], ["run", MODEL, "hi"]):
        assert run(command) == 5
        assert (
            one_line(capsys.readouterr().err) == "shoal: no Shoal node is running here: start one with `shoal up`\n"
        )
    assert run(["ls", "--gateway", "127.0.0.1:9"]) == 5
    assert "no gateway answers at http://127.0.0.1:9" in one_line(capsys.readouterr().err)


def test_a_server_that_is_no_gateway_is_reported_as_such(serve: Callable[[Starlette], str], capsys: Capture) -> None:
    assert run(["ls", "--gateway", serve(Starlette())]) == 1
    assert "is not a Shoal gateway: status 404" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["pul", MODEL], "did you mean `shoal pull`?"),
        (["--home", "/x", "stauts"], "did you mean `shoal status`?"),
        (["frobnicate"], "shoal --help"),
        (["pull"], "shoal pull --help"),
        (["pull", "a b"], "write org/name"),
        (["pull", MODEL, "--node", "a", "--all"], "not allowed with"),
        (["pull", MODEL, "--node", "NO"], "not a node id"),
        (["place", MODEL, "--nodes", "0"], "0 is not between 1 and"),
        (["run", MODEL, "--temperature", "9"], "9.0 is not between 0 and 2"),
        (["up", "--port", "99999"], "99999 is not between 0 and 65535"),
        (["up", "--max-storage", "lots"], "200GB"),
        (["up", "--max-storage", "50"], "50 has no unit: write 50B, 50kB, 50MB, 50GB"),
        (["up", "--wait", "60"], "60 has no unit: write 60s, 60min, 60h, 60d"),
        (["up", "--add-library", "/nowhere"], "/nowhere is no directory of this machine"),
        (["transfer", "set", "--max-hub-rate", "20"], "20 has no unit: write 20B/s, 20kB/s, 20MB/s"),
        (["storage", "set", "--headroom", "5"], "5 has no unit"),
        (["storage", "set", "--partial-retention", "7"], "7 has no unit: write 7s, 7min, 7h, 7d"),
        (["storage", "plan", "--need", "50"], "50 has no unit"),
        (["invite", "--for", "10"], "10 has no unit"),
        (["events", "--since", "10"], "10 has no unit"),
        (["remove", MODEL], "did you mean `shoal rm`?"),
        (["serve", MODEL], "did you mean `shoal run`?"),
        (["restart", "everything"], "'everything' is not one of storage, "),
        (["up", "--eviction-policy", "fifo"], "'fifo' is not one of manual, lru"),
        (["storage", "shwo"], "did you mean `shoal storage show`?"),
        (["storage", "set"], "nothing to set"),
        (["storage", "set", "--max-storage", "lots"], "200GB"),
        (["storage", "set", "--headroom", "none"], "200GB"),
        (["storage", "set", "--eviction-policy", "fifo"], "'fifo' is not one of manual, lru"),
        (["storage", "set", "--headroom", "1GB", "--node", "NO"], "not a node id"),
        (["storage", "--all", "set", "--headroom", "1GB", "--node", "a"], "give one of them"),
        (["storage", "plan"], "--need"),
        (["storage", "plan", "--need", "-5"], "is not a size"),
        (["storage", "pin", "-fish/a"], "pin --help"),
        (["storage", "pin", "a/b/c"], "write org/name"),
        (["storage", "show", "--node", "a", "--all"], "not allowed with"),
        (["verify", "a//b"], "write org/name"),
        (["gc", MODEL], f"unexpected extra argument(s) ({MODEL}); see `shoal gc --help`"),
        (["pull", MODEL, "--nod", "a"], "did you mean --node?; see `shoal pull --help`"),
        (["rm", f"{MODEL}@x", "--revision", "y"], "given twice"),
    ],
)
def test_what_is_not_understood_ends_with_exit_code_2_and_a_hint(
    cluster: Cluster, capsys: Capture, arguments: list[str], hint: str
) -> None:
    assert run(arguments) == 2
    assert hint in one_line(capsys.readouterr().err)
    assert cluster.requests == []


def test_hub_prints_the_environment_to_pull_from_the_cluster(
    cluster: Cluster, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path))
    (tmp_path / "node.toml").write_text('id = "node-a"\n')
    assert run(["hub"]) == 0
    key = read_api_key(tmp_path)
    assert capsys.readouterr().out == f"export HF_ENDPOINT=http://192.0.2.7:4242\nexport HF_TOKEN={key}\n"
    assert run(["hub", "--node", "node-b"]) == 5
    assert "the fileserver of node node-b is not running" in one_line(capsys.readouterr().err)
    assert run(["hub", "--node", "node-z"]) == 3


def test_I12_hub_gives_another_node_another_key(
    cluster: Cluster, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path))
    (tmp_path / "node.toml").write_text('id = "node-c"\n')
    assert run(["hub"]) == 0
    output = capsys.readouterr()
    assert output.out == "export HF_ENDPOINT=http://192.0.2.7:4242\n"
    assert "node node-a may want its key" in output.err
    assert not (tmp_path / "api.key").exists(), "this home's key is of no use there"
    monkeypatch.setenv("SHOAL_API_KEY", "of-node-a")
    assert run(["hub", "--json"]) == 0
    shown = {"HF_ENDPOINT": "http://192.0.2.7:4242", "HF_TOKEN": "of-node-a"}
    assert json.loads(capsys.readouterr().out) == shown


def test_key_prints_the_key_and_replaces_it(capsys: Capture, tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert run(["key", "--home", str(home)]) == 0
    key = capsys.readouterr().out
    assert key == f"{read_api_key(home)}\n"
    assert run(["key", "--home", str(home), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"key": key.strip()}
    assert run(["key", "--home", str(home), "--new"]) == 0
    new = capsys.readouterr().out
    assert new == f"{read_api_key(home)}\n" != key
    (home / "api.key").write_text("")
    assert run(["key", "--home", str(home)]) == BadInput.exit_code
    assert "api.key does not hold a key" in one_line(capsys.readouterr().err)


def test_status_shows_nodes_disks_models_downloads_and_instances(cluster: Cluster, capsys: Capture) -> None:
    cluster.models, cluster.instances = [held()], [instance("ready")]
    cluster.downloads = [[download("fetching", 250, sources={"hub": 250}, speed_bytes_per_s=100.0, eta_s=7.5)]]
    assert run(["status"]) == 0
    output = capsys.readouterr().out
    for expected in (
        "node-a",
        "up 1 min 05 s, by Thunderbolt",
        "48.0 GB of 64.0 GB",
        "1.0 TB, manual",
        "node-b",
        "down",
        "5.0 GB (0 %)",
        "node-a[0-7]",
    ):
        assert expected in output
    assert "org/fish  node-a: 25 %, 250 B of 1.0 kB, 100 B/s, 8 s left, from hub" in output
    assert "node-a: 3 foreign files, 7 B, never deleted: index.db, …\n" in output


def test_json_documents_are_those_of_the_api(cluster: Cluster, capsys: Capture) -> None:
    cluster.models, cluster.instances = [held()], [instance("ready")]
    assert run(["status", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["node"] == "node-a" and status["a field of a later version"] == 1
    assert run(["ls", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"models": [held()]}
    assert run(["ps", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"instances": [instance("ready")]}


def test_every_json_document_is_described_in_its_help(capsys: Capture) -> None:
    for command in ("status", "ls", "ps", "pull", "storage", "gc", "verify"):
        assert run([command, "--help"]) == 0
        assert "--json prints" in capsys.readouterr().out


def test_ls_lists_models_and_shows_how_to_get_one(cluster: Cluster, capsys: Capture) -> None:
    assert run(["ls"]) == 0
    assert "shoal pull" in capsys.readouterr().out
    cluster.models = [held()]
    assert run(["ls"]) == 0
    output = capsys.readouterr().out
    assert "org/fish" in output and COMMIT[:8] in output and "node-a, node-b (down)" in output


def test_ps_names_the_node_that_is_gone(cluster: Cluster, capsys: Capture) -> None:
    error = StageLost("node node-b is down since 1970-01-02T00:00:00+00:00").body()
    cluster.instances = [{**lacking("degraded"), "error": msgspec.to_builtins(error)}, lacking("starting", "i2")]
    assert run(["ps"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert (
        "degraded: node node-b is down since" in output
        and "starting, node-a linking: no connection to stage 1, node-b down" in output
    )


def test_an_incomplete_model_stays_in_sight(cluster: Cluster, capsys: Capture) -> None:
    cluster.incomplete = ["org/fish@c0"]
    line = "node-a: org/fish@c0 is incomplete: `shoal repair org/fish@c0 --node node-a` repairs it"
    for command in (["ls"], ["status"]):
        assert run(command) == 0
        assert line in " ".join(capsys.readouterr().out.split())
    assert run(["ls", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["incomplete"] == {"node-a": ["org/fish@c0"]}


def test_I12_a_homes_key_is_shown_to_its_own_gateway_only(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    home, url = tmp_path / "home", os.environ["SHOAL_GATEWAY"]
    key = ensure_api_key(home)
    (home / "run").mkdir()
    (home / "run" / "gateway.url").write_text(f"{url}\n")
    monkeypatch.setenv("SHOAL_HOME", str(home))
    assert run(["ls"]) == 0
    assert "authorization" not in cluster.headers
    monkeypatch.setenv("SHOAL_API_KEY", "of-the-other-one")
    assert run(["ls", "--gateway", url]) == 0
    assert cluster.headers["authorization"] == "Bearer of-the-other-one"
    monkeypatch.delenv("SHOAL_GATEWAY")
    assert run(["ls"]) == 0
    assert cluster.headers["authorization"] == f"Bearer {key}"
    monkeypatch.setenv("SHOAL_API_KEY", "of two\nlines")
    assert run(["ls", "--gateway", url]) == BadInput.exit_code
    assert "two" not in one_line(capsys.readouterr().err)


def test_an_unexpected_error_is_one_line_and_a_trace_on_request(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise LookupError("a fault of ours")

    monkeypatch.setattr("shoal_cli.api.client.resolve_gateway", fail)
    assert run(["ls", "--home", str(tmp_path)]) == 1
    assert "SHOAL_DEBUG=1" in one_line(capsys.readouterr().err)
    monkeypatch.setenv("SHOAL_DEBUG", "1")
    with pytest.raises(LookupError):
        run(["ls", "--home", str(tmp_path)])


def test_version_and_help_need_no_node(capsys: Capture) -> None:
    assert run(["version"]) == 0
    assert capsys.readouterr().out.startswith("shoal 0.")
    assert run([]) == 0
    assert "Exit codes:" in capsys.readouterr().out


def test_status_shows_verified_bytes_rates_and_source_switches(cluster: Cluster, capsys: Capture) -> None:
    cluster.downloads = [
        [
            download(
                "fetching",
                500,
                verified_bytes=200,
                source_speeds={"hub": 10.0, "node-b": 40.0},
                speed_bytes_per_s=50.0,
                eta_s=10.0,
                source_switches={"node-c": 2},
            )
        ]
    ]
    assert run(["status"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "500 B of 1.0 kB, 200 B verified, 50 B/s, 10 s left, node-c stalled 2 times" in output
    assert "from node-b 40 B/s, hub 10 B/s" in output
