"""`shoal storage`, `shoal gc`, `shoal verify` and `shoal repair`, against a gateway of the test."""

from __future__ import annotations

import json
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from shoal_cli.cli import run
from shoal_cli.render.storage_text import library_lines, plan_lines
from shoal_common.errors import BadInput, NodeDown, NotFound, Refused
from shoal_common.messages.storage import EvictionPlan, LibraryState, Victim
from shoal_common.names import ModelId
from tests.cli.fake_gateway import COMMIT, MODEL, Cluster

Capture = pytest.CaptureFixture[str]
GB = 10**9
HELD = f"{MODEL}@{COMMIT}"


def disk(node: str, **storage: Any) -> dict[str, Any]:
    """A node's disk as the gateway shows it."""
    state = {"node": node, "used_bytes": 50 * GB, "reserved_bytes": 10 * GB, "free_bytes": 300 * GB, "model_count": 4}
    state |= {"quota_bytes": 200 * GB, "headroom_bytes": 5 * GB, "eviction_policy": "lru"}
    return {"node": node, "live": True, "disk_free_bytes": 299 * GB, "storage": {**state, **storage}}


def test_storage_shows_the_gateways_disk_its_settings_and_notes(cluster: Cluster, capsys: Capture) -> None:
    since_s = time.time() - 7200
    leases = [
        {"id": "l1", "model": HELD, "holder": "stage 0 of instance x", "since_s": since_s, "pid": 4711},
        {"id": "l2", "model": HELD, "holder": "me", "since_s": since_s},
    ]
    cluster.disks = [
        disk(
            "node-a", pinned=[HELD], quarantined=["ab" * 32], overridden_by_env=["max_storage_bytes"], leases=leases
        ),
        disk("node-b", distrusted_sealers=["node-z"]),
    ]
    for arguments in (["storage"], ["storage", "show"], ["storage", "show", "--node", "node-a"]):
        assert run(arguments) == 0
        output = capsys.readouterr().out
        for expected in ("200.0 GB", "lru", "5.0 GB", "299.0 GB", "50.0 GB (25 %)"):
            assert expected in output
        assert "node-a: 10.0 GB reserved for downloads" in output
        assert f"node-a: {HELD} is pinned" in output
        assert "node-a: corrupt blob abababababababab… in quarantine" in output
        assert f"node-a: {HELD} is in use by stage 0 of instance x (pid 4711), for 2 h" in output
        assert f"node-a: {HELD} is in use by me, for 2 h" in output
        assert "node-a: max_storage_bytes is set by the environment" in output
        assert "node-b" not in output
    assert run(["storage", "--node", "node-b"]) == 0
    output = capsys.readouterr().out
    assert "node-a" not in output
    assert "node-b: seals of node node-z do not count: it sealed a corrupt blob" in output


def test_storage_lists_foreign_files_and_that_they_stay(cluster: Cluster, capsys: Capture) -> None:
    first = ["index.db", "blobs/sha256/ab/notes.txt"]
    cluster.disks = [disk("node-a", foreign_count=3, foreign_bytes=12 * GB, foreign_files=first, unverified_count=1)]
    assert run(["storage"]) == 0
    output = capsys.readouterr().out
    assert "node-a: 3 foreign files, 12.0 GB, never deleted: index.db, blobs/sha256/ab/notes.txt, …" in output
    assert "node-a: 1 copied-in file, 0 B, to be verified before use" in output and "is missing" not in output
    cluster.disks = [disk("node-a", foreign_count=1, foreign_bytes=1, foreign_files=first[:1], store_missing=True)]
    assert run(["storage"]) == 0
    output = capsys.readouterr().out
    assert "node-a: 1 foreign file, 1 B, never deleted: index.db\n" in output
    assert "node-a: the store is missing: mount its disk, or put it back" in output


def test_storage_shows_all_disks_also_those_of_down_nodes(cluster: Cluster, capsys: Capture) -> None:
    down = {**disk("node-c", quota_bytes=None), "live": False, "disk_free_bytes": None}
    new = {"node": "node-d", "live": True, "disk_free_bytes": 7, "storage": None}
    cluster.disks = [disk("node-a"), down, new]
    for arguments in (["storage", "--all"], ["storage", "show", "--all"]):
        assert run(arguments) == 0
        output = capsys.readouterr().out
        assert "node-c (down)" in output and "none" in output and "300.0 GB" in output and "node-d" in output
    assert run(["storage", "--all", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"node": "node-a", "nodes": cluster.disks}
    assert run(["storage", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"node": "node-a", "nodes": cluster.disks[:1]}


def test_volumes_are_shown_added_and_removed_one_by_one(cluster: Cluster, capsys: Capture) -> None:
    big = {"path": "/mnt/big", "used_bytes": 2 * GB, "blob_count": 3, "free_bytes": 9 * GB, "headroom_bytes": GB}
    gone = {"path": "/mnt/gone", "error": "it is not there: mount its disk"}
    cluster.disks = [
        disk("node-a", volumes=[{**big, "duplicate_bytes": GB, "reserved_bytes": GB}, gone]),
        disk("node-b"),
    ]
    assert run(["storage"]) == 0
    output = capsys.readouterr().out
    assert "node-a: volume /mnt/big: 3 blobs, 2.0 GB; 9.0 GB free, 1.0 GB of it headroom, 1.0 GB reserved" in output
    assert "1.0 GB of duplicates: `shoal gc` deletes them" in output
    assert "node-a: volume /mnt/gone is not used: it is not there: mount its disk" in output


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of node-a, which is this machine's."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("SHOAL_HOME", str(home))
    (home / "node.toml").write_text(
        'id = "node-a"\n[storage]\nlibraries = ["/nas", "/old"]\nvolumes = ["/mnt/big"]\n'
    )
    return home


def directories(home: Path, *names: str) -> list[str]:
    """Directories that are there."""
    for name in names:
        (home.parent / name).mkdir()
    return [str(home.parent / name) for name in names]


def storage_in(home: Path) -> dict[str, Any]:
    section: dict[str, Any] = tomllib.loads((home / "node.toml").read_text())["storage"]
    return section


def test_directories_are_written_here_and_storage_reads_them(
    cluster: Cluster, capsys: Capture, own_home: Path
) -> None:
    cluster.disks = [disk("node-a"), disk("node-b")]
    first, second = directories(own_home, "a", "b")
    new = f"{first}/new"  # which storage makes
    cluster.disk_results = {"node-a": {"libraries": ["/nas", first, second], "volumes": ["/mnt/big", new]}}
    arguments = ["storage", "set", "--add-library", first, "--add-library", second, "--headroom", "5GB"]
    assert run([*arguments, "--remove-library", "/old", "--add-volume", new]) == 0
    assert cluster.requests[-1] == ("POST", "/v1/storage/reload", {"node": "node-a"})
    assert f"  library /nas\n  library {first}\n  library {second}\n  volume /mnt/big" in capsys.readouterr().out
    assert storage_in(own_home) == {
        "libraries": ["/nas", first, second],
        "volumes": ["/mnt/big", new],
        "headroom_bytes": 5 * GB,
    }
    assert run(["storage", "set", "--remove-volume", "/mnt/gone"]) == NotFound.exit_code
    assert f"/mnt/gone is not a volume of node-a (known: /mnt/big, {new})" in capsys.readouterr().err
    assert run(["storage", "set", "--all", "--add-library", "/a"]) == BadInput.exit_code


def test_a_path_that_is_not_there_is_refused_and_changes_nothing(
    cluster: Cluster, capsys: Capture, own_home: Path
) -> None:
    before = storage_in(own_home)
    cluster.disks = [disk("node-a")]
    [path] = directories(own_home, "a")
    for typo in (f"{path}z", f"{path}/no/such"):
        for flag in ("--add-library", "--add-volume"):
            if (flag, typo) != ("--add-volume", f"{path}z"):  # storage makes it
                assert run(["storage", "set", "--add-library", path, flag, typo]) == BadInput.exit_code
                assert f"{typo} is no directory of this machine" in capsys.readouterr().err
    assert storage_in(own_home) == before
    assert cluster.asked("POST", "/v1/storage/reload") == []


def test_I12_directories_of_another_node_are_set_there(cluster: Cluster, capsys: Capture, own_home: Path) -> None:
    before = (own_home / "node.toml").read_text()
    cluster.disks = [disk("node-a"), disk("node-b")]
    assert run(["storage", "set", "--node", "node-b", "--add-library", "/a"]) == Refused.exit_code
    assert "run this command on node-b" in capsys.readouterr().err
    (own_home / "node.toml").write_text(before.replace("node-a", "node-c"))
    assert run(["storage", "set", "--add-library", "/a"]) == Refused.exit_code, "the gateway is node-a's"
    assert "run this command on node-a" in capsys.readouterr().err
    assert {method for method, _, _ in cluster.requests} == {"GET"}


def test_what_storage_refuses_is_put_back(cluster: Cluster, capsys: Capture, own_home: Path) -> None:
    before = storage_in(own_home)
    cluster.disks = [disk("node-a")]
    cluster.refuses_once = BadInput("the volume /new cannot be used: mount its disk")
    [path] = directories(own_home, "a")
    arguments = ["storage", "set", "--add-volume", f"{path}/new", "--add-library", path, "--headroom", "5GB"]
    assert run(arguments) == BadInput.exit_code
    assert "mount its disk" in capsys.readouterr().err
    assert storage_in(own_home) == before
    cluster.disk_results = {"node-a": {"overridden_by_env": ["libraries"]}}
    assert run(arguments) == Refused.exit_code
    assert "unset SHOAL_LIBRARIES" in capsys.readouterr().err
    assert storage_in(own_home) == before


def test_directories_of_a_node_that_is_down_apply_at_its_start(
    cluster: Cluster, capsys: Capture, own_home: Path
) -> None:
    cluster.disks = [disk("node-a")]
    cluster.refuses_once = NodeDown("storage of node-a is not live")
    [path] = directories(own_home, "a")
    assert run(["storage", "set", "--add-library", path]) == 0
    assert "it applies when storage of node-a starts" in capsys.readouterr().out
    assert storage_in(own_home)["libraries"] == ["/nas", "/old", path]


def test_storage_of_an_unknown_node_names_the_known_ones(cluster: Cluster, capsys: Capture) -> None:
    cluster.disks = [disk("node-a")]
    assert run(["storage", "--node", "node-x"]) == NotFound.exit_code
    assert capsys.readouterr().err == "shoal: no node with storage named node-x: did you mean node-a?\n"


@pytest.mark.parametrize(
    ("arguments", "body"),
    [
        (
            ["--max-storage", "200GB", "--eviction-policy", "lru", "--headroom", "5GB"],
            {"max_storage_bytes": 200 * GB, "eviction_policy": "lru", "headroom_bytes": 5 * GB},
        ),
        (["--max-storage", "none"], {"max_storage_bytes": None}),
        (["--headroom", "0", "--node", "node-b"], {"headroom_bytes": 0, "node": "node-b"}),
        (["--eviction-policy", "manual", "--all"], {"eviction_policy": "manual", "node": "all"}),
    ],
)
def test_storage_set_sends_the_given_and_prints_the_new_settings(
    cluster: Cluster, capsys: Capture, arguments: list[str], body: dict[str, Any]
) -> None:
    result = {"max_storage_bytes": None, "eviction_policy": "lru", "headroom_bytes": 5 * GB, "command": "c1"}
    cluster.disk_results = {"node-a": {**result, "note": "60 GB are used already"}}
    assert run(["storage", "set", *arguments]) == 0
    assert cluster.requests == [("PUT", "/v1/storage/config", body)]
    assert capsys.readouterr().out == (
        "node-a: quota none, eviction policy lru, headroom 5.0 GB\n  60 GB are used already\n"
    )
    assert run(["storage", "set", "--json", *arguments]) == 0
    assert json.loads(capsys.readouterr().out) == {"nodes": cluster.disk_results}


def test_storage_set_takes_a_duration_for_partial_retention(cluster: Cluster, capsys: Capture) -> None:
    result = {"eviction_policy": "lru", "headroom_bytes": 5 * GB, "partial_retention_s": 7 * 86400, "command": "c1"}
    cluster.disk_results = {"node-a": result}
    assert run(["storage", "set", "--partial-retention", "7d"]) == 0
    assert cluster.requests == [("PUT", "/v1/storage/config", {"partial_retention_s": 604800})]
    assert "\n  data of abandoned downloads is kept for 7 d 0 h\n" in capsys.readouterr().out
    assert run(["storage", "set", "--partial-retention", "soon"]) == 2
    assert "'soon' is not a duration: write it like 12h or 7d" in capsys.readouterr().err


def test_storage_shows_a_full_disk_and_leftovers_of_downloads(cluster: Cluster, capsys: Capture) -> None:
    cluster.disks = [disk("node-a", free_bytes=0, ended_downloads=[HELD])]
    assert run(["storage"]) == 0
    output = capsys.readouterr().out
    assert "node-a: the disk is full" in output and f"node-a: data of the abandoned download of {HELD}" in output


def test_a_library_as_text_says_what_it_serves_and_what_not() -> None:
    assert library_lines(LibraryState(path="/nas", error="Permission denied")) == [
        "library /nas cannot be read: Permission denied"
    ]
    root = LibraryState(
        path="/nas",
        model_count=2,
        unhashed_count=1,
        unhashed_bytes=GB,
        rejected={"/nas/x": "it has no weights"},
        rejected_count=3,
    )
    assert library_lines(root) == [
        "library /nas: 2 models",
        "library /nas: 1 model to be hashed, 1.0 GB",
        "library /nas: ignored /nas/x: it has no weights",
        "library /nas: ignored 2 more; `shoal logs storage` says why",
    ]


def test_a_setting_that_storage_refuses_is_one_line_and_exit_4(cluster: Cluster, capsys: Capture) -> None:
    cluster.fails = Refused("headroom_bytes comes from the environment here")
    assert run(["storage", "set", "--headroom", "5GB"]) == 4
    assert capsys.readouterr().err == "shoal: headroom_bytes comes from the environment here\n"


def test_storage_plan_shows_what_would_be_evicted(cluster: Cluster, capsys: Capture) -> None:
    victim = {"model": HELD, "freed_bytes": 60 * GB, "last_use_s": 5.0}
    plan = {"required_bytes": 50 * GB, "victims": [victim], "freed_bytes": 60 * GB, "enough": True}
    cluster.disk_results = {"node-b": plan}
    assert run(["storage", "plan", "--need", "50GB", "--node", "node-b"]) == 0
    assert cluster.asked("GET", "/v1/storage/plan") == [{"need_bytes": str(50 * GB), "node": "node-b"}]
    output = capsys.readouterr().out
    assert "node-b: to have 50.0 GB free, 50.0 GB must go; this would evict 60.0 GB:" in output
    assert f"  {HELD}, 60.0 GB, last used " in output
    assert run(["storage", "plan", "--need", "50GB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"nodes": {"node-b": plan}}


def test_a_plan_shows_its_victims_or_that_nothing_can_go() -> None:
    nothing = EvictionPlan(required_bytes=0, enough=True)
    assert plan_lines("a", 5 * GB, nothing, 0.0) == ["a: 5.0 GB are free already; nothing would be evicted"]
    enough = EvictionPlan(
        required_bytes=3 * GB,
        garbage=["ab"],
        garbage_bytes=GB,
        victims=[Victim(model=ModelId("org/old@c"), freed_bytes=4 * GB, last_use_s=1000.0)],
        freed_bytes=5 * GB,
        enough=True,
    )
    assert plan_lines("a", 5 * GB, enough, 1000.0 + 7200) == [
        "a: to have 5.0 GB free, 3.0 GB must go; this would evict 5.0 GB:",
        "  1 unreferenced blob, 1.0 GB",
        "  org/old@c, 4.0 GB, last used 2 h 00 min ago",
    ]
    short = EvictionPlan(
        required_bytes=3 * GB,
        evictable_bytes=GB,
        protected={ModelId("org/b@c"): "used by instance i1", ModelId("org/a@c"): "pinned"},
    )
    assert plan_lines("a", 5 * GB, short, 0.0) == [
        "a: cannot free 5.0 GB: 3.0 GB needed, 1.0 GB evictable",
        "  keeps org/a@c: pinned",
        "  keeps org/b@c: used by instance i1",
    ]


@pytest.mark.parametrize(
    ("action", "pinned", "expected"),
    [("pin", True, "is pinned: never evicted or deleted"), ("unpin", False, "is no longer pinned")],
)
def test_storage_pin_and_unpin_name_the_models_and_the_node(
    cluster: Cluster, capsys: Capture, action: str, pinned: bool, expected: str
) -> None:
    cluster.disk_results = {"node-a": {"models": [HELD], "pinned": pinned}}
    assert run(["storage", action, f"{MODEL}@main"]) == 0
    assert capsys.readouterr().out == f"node-a: {HELD} {expected}\n"
    assert run(["storage", action, MODEL, "--all", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"nodes": cluster.disk_results}
    assert cluster.asked("POST", "/v1/storage/pins") == [
        {"model": f"{MODEL}@main", "pinned": pinned},
        {"model": MODEL, "pinned": pinned, "node": "all"},
    ]


def test_gc_prints_what_was_removed(cluster: Cluster, capsys: Capture) -> None:
    cluster.disk_results = {"node-a": {"blobs": 3, "freed_bytes": 2 * GB}, "node-b": {"blobs": 0, "freed_bytes": 0}}
    assert run(["gc", "--all"]) == 0
    assert capsys.readouterr().out == "node-a: deleted 3 blobs, 2.0 GB freed\nnode-b: nothing to delete\n"
    assert run(["gc", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"nodes": cluster.disk_results}
    assert cluster.asked("POST", "/v1/storage/gc") == [{"node": "all"}, {}]
