"""What `shoal doctor` makes of facts: every finding, without any I/O."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.js import api
from rich.console import Console

from shoal_cli.doctor import checks, finding, render
from shoal_cli.doctor.checks import (
    clocks,
    disk,
    duplicate_ids,
    machine,
    nats,
    peers,
    permissions,
    ports,
    reachability,
    services,
    versions,
)
from shoal_cli.doctor.checks.clocks import ClockOffset
from shoal_cli.doctor.checks.disk import DiskFacts, FileSystemInfo
from shoal_cli.doctor.checks.machine import MemoryFacts, OpenFiles
from shoal_cli.doctor.checks.nats import JetStreamMonitor, NatsFacts, NatsServerInfo, StreamStatus
from shoal_cli.doctor.checks.peers import AddressReach, FileserverReach
from shoal_cli.doctor.checks.permissions import PathPermission, PermissionFacts
from shoal_cli.doctor.checks.ports import ExpectedPort, PortListener
from shoal_cli.doctor.checks.reachability import OsInfo
from shoal_cli.doctor.checks.services import ServiceFacts, SystemdUnit
from shoal_cli.doctor.finding import Finding
from shoal_cli.doctor.probes.local_node import servers_of, with_secret
from shoal_cli.doctor.probes.systemd_units import parse
from shoal_cli.doctor.run import CHECKS, DoctorReport
from shoal_cli.node.children.restart_policy import ChildStatus
from shoal_cli.node.control import SupervisorStatus
from shoal_common.bus.streams import stream_configs
from shoal_common.host.interfaces import Interface
from shoal_common.messages.liveness import ProcessIdentity
from shoal_common.messages.storage import LibraryState, StorageState, VolumeState
from shoal_storage import settings
from shoal_storage.files import ballast

GB = 10**9
PACKAGE = Path(checks.__file__).parent


def only(found: list[Finding], check: str = "") -> Finding:
    """The one finding, of one check where several are made."""
    [one] = [f for f in found if not check or f.check == check]
    return one


def assert_finding(found: Finding, level: str, *texts: str) -> None:
    """It has this level and these words, and a remedy where something is wrong."""
    assert found.level == level, found
    for word in texts:
        assert word in f"{found.what} {found.remedy}", (word, found)
    assert found.remedy or level in ("ok", "skipped"), found


@pytest.mark.parametrize("module", [*sorted(f"checks/{p.stem}" for p in PACKAGE.glob("*.py")), "finding", "render"])
def test_checks_do_no_io(module: str) -> None:
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse((PACKAGE.parent / f"{module}.py").read_text()))
        for name in (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert not imported & {"asyncio", "httpx2", "os", "pathlib", "psutil", "socket", "subprocess", "time"}


# Services


def child(name: str, **more: Any) -> ChildStatus:
    return ChildStatus(**{"name": name, "phase": "ready", "pid": 7, "was_ready": True, **more})


def supervised(*children: ChildStatus, **more: Any) -> list[Finding]:
    facts = {"home": "/h", "node": "a", "supervisor": "running", "pid": 5, "children": children, **more}
    return services.check(ServiceFacts(**facts))


def test_services_that_run_are_one_line() -> None:
    assert_finding(
        only(supervised(child("nats"), child("storage"), live=["storage"])), "ok", "nats, storage", "pid 5"
    )


def test_a_service_that_is_not_running_shows_its_logs_end() -> None:
    down = child("fetcher", phase="waiting", exits_in_a_row=4, last_exit_code=3)
    found = only(supervised(down, log_tails={"fetcher": "no such frobnicator"}))
    assert_finding(found, "problem", "fetcher is not running", "exit code 3", "4 in a row", "no such frobnicator")


def test_a_claimed_service_is_a_finding_that_names_its_holder() -> None:
    assert_finding(
        only(supervised(child("storage", phase="waiting", last_exit_code=9))), "problem", "systemd", "node id"
    )


def test_a_service_that_keeps_exiting_is_a_warning_while_it_runs() -> None:
    assert_finding(
        only(supervised(child("storage", exits_in_a_row=3, last_exit_code=-9))), "warning", "3 times", "SIGKILL"
    )
    assert only(supervised(child("storage", exits_in_a_row=1, last_exit_code=-9))).level == "ok"
    assert_finding(
        only(supervised(child("storage", exits_in_a_row=1, restart_count=40, last_exit_code=1))),
        "warning",
        "40 times",
    )
    assert only(supervised(child("storage", restart_count=40))).level == "ok", "restarts that people asked for"


def test_a_service_that_starts_is_waited_for() -> None:
    assert_finding(only(supervised(child("storage", phase="starting", was_ready=False))), "warning", "not ready yet")


def test_a_service_unseen_by_the_cluster_is_a_problem() -> None:
    assert_finding(only(supervised(child("nats"), child("storage"), live=[])), "problem", "storage", "does not see")
    assert only(supervised(child("nats"), child("storage"), live=None)).level == "ok", "nobody can say"


@pytest.mark.parametrize(
    ("more", "level", "texts"),
    [
        ({"supervisor": "unresponsive", "pid": 9}, "problem", ("pid 9", "does not answer")),
        ({"supervisor": "foreign"}, "skipped", ("another user",)),
        ({}, "problem", ("node a is not running", "shoal up")),
        ({"node": ""}, "warning", ("no node was ever started",)),
        ({"live": ["storage", "gateway"]}, "ok", ("storage, gateway",)),
    ],
)
def test_a_node_without_our_services_has_the_reason(more: dict[str, Any], level: str, texts: tuple[str, ...]) -> None:
    assert_finding(only(services.check(ServiceFacts(**{"home": "/h", "node": "a", **more}))), level, *texts)


@pytest.mark.parametrize(
    ("unit", "level", "texts"),
    [
        (SystemdUnit(name="storage", active="active"), "ok", ("systemd runs storage",)),
        (SystemdUnit(name="storage", active="failed", result="exit-code"), "problem", ("exit-code", "journalctl")),
        (SystemdUnit(name="storage", active="activating", restart_count=4), "problem", ("4 restarts",)),
        (SystemdUnit(name="storage", active="activating"), "warning", ("not ready yet",)),
        (SystemdUnit(name="storage", active="inactive"), "problem", ("enable --now shoal-storage",)),
        (SystemdUnit(name="nats", active="inactive"), "ok", ()),
        (SystemdUnit(name="storage", active="active", restart_count=9), "warning", ("restarted 9 times",)),
    ],
)
def test_units_of_systemd_are_read(unit: SystemdUnit, level: str, texts: tuple[str, ...]) -> None:
    assert_finding(only(services.check(ServiceFacts(home="/h", node="a", units=[unit]))), level, *texts)


def test_what_systemctl_prints_is_understood() -> None:
    text = "Result=success\nNRestarts=2\nId=shoal-storage.service\nActiveState=active\n\nId=shoal-nats.service\n"
    assert parse(text) == [
        SystemdUnit(name="storage", active="active", result="success", restart_count=2),
        SystemdUnit(name="nats", active=""),
    ]
    assert parse("") == []


# Ports


def want(**more: Any) -> ExpectedPort:
    return ExpectedPort(**{"service": "gateway", "host": "127.0.0.1", "port": 8080, "running": True, **more})


@pytest.mark.parametrize(
    ("wanted", "listeners", "level", "texts"),
    [
        (want(), [PortListener(8080, 1, "python")], "ok", ("gateway 8080",)),
        (want(), [PortListener(8080, 0)], "ok", ("gateway 8080",)),
        (want(), [], "problem", ("does not listen on port 8080", "shoal restart gateway")),
        (want(service="fileserver", port=0), [], "problem", ("listens on no port",)),
        (want(), [PortListener(8080, 2, "httpd")], "problem", ("taken by httpd, pid 2", "--port")),
        (want(running=False), [], "ok", ("8080 (free)",)),
        (want(running=False, bind_problem="in use"), [PortListener(8080, 0)], "problem", ("another user",)),
        (want(running=False, bind_problem="Cannot assign"), [], "problem", ("Cannot assign", "an address of this")),
        (
            want(service="nats", port=4222, running=False, bind_problem="in use"),
            [PortListener(4222, 2, "nats-server")],
            "problem",
            ("join that server", "shoal up --nats nats://127.0.0.1:4222", "--nats-port"),
        ),
    ],
)
def test_a_port_is_ours_or_free_or_taken(
    wanted: ExpectedPort, listeners: list[PortListener], level: str, texts: tuple[str, ...]
) -> None:
    assert_finding(only(ports.check([wanted], listeners, {1})), level, *texts)


# Reaching


LAN = (Interface("en0", "wifi", 0, ("192.168.1.5/24",)),)


@pytest.mark.parametrize(
    ("error", "address", "system", "text"),
    [
        ("no_route", "192.168.1.9:80", OsInfo("darwin", 15, LAN), "Privacy & Security > Local Network"),
        ("no_route", "192.168.1.9:80", OsInfo("darwin", 14, LAN), "is this still its address"),
        ("no_route", "192.168.1.9:80", OsInfo("linux", 0, LAN), "is this still its address"),
        ("no_route", "10.9.9.9:80", OsInfo("darwin", 15, LAN), "no network of this machine has that address"),
        ("timeout", "192.168.1.9:80", OsInfo("darwin", 15, LAN), "firewall"),
        ("refused", "192.168.1.9:80", OsInfo(), "start it there"),
        ("unknown_host", "there:80", OsInfo(), "correct the name"),
        ("no_reply", "192.168.1.9:80", OsInfo(), "it hangs"),
        ("broken", "192.168.1.9:80", OsInfo(), "to see what listens there"),
    ],
)
def test_each_connect_error_has_a_remedy(
    error: reachability.ConnectError, address: str, system: OsInfo, text: str
) -> None:
    assert text in reachability.connect_remedy(error, address, system, "the other")
    assert reachability.describe(error, "")


# NATS


def streams(**changed: Any) -> list[StreamStatus]:
    """All as they have to be; `KV_lease` with changes."""
    out = []
    for wanted, found in zip(stream_configs(1), stream_configs(1), strict=True):
        for name, value in changed.items() if wanted.name == "KV_lease" else ():
            setattr(found, name, value)
        out.append(StreamStatus(wanted, found))
    return out


GOOD = NatsServerInfo(url="nats://n:4222", version="2.11.4", jetstream=True)
REFUSED = msgspec.structs.replace(GOOD, connect_error="refused")


def on(**more: Any) -> list[Finding]:
    facts = {"servers": [GOOD], "connected": True, "streams": streams(), "store_used_bytes": 10, **more}
    return nats.check(NatsFacts(**facts), OsInfo())


def test_a_good_nats_is_three_lines() -> None:
    assert [(f.check, f.level) for f in on()] == [("nats", "ok"), ("streams", "ok"), ("nats store", "ok")]


@pytest.mark.parametrize(
    ("facts", "level", "texts"),
    [
        (
            {"servers": [msgspec.structs.replace(GOOD, connect_error="refused")]},
            "problem",
            ("nothing listens there",),
        ),
        ({"servers": [GOOD], "denied": "Authorization Violation"}, "problem", ("refuses our credentials", "secret")),
        ({"servers": [GOOD], "error": "TLS"}, "problem", ("connecting fails: TLS",)),
        ({"servers": [REFUSED], "expected": False}, "skipped", ()),
    ],
)
def test_an_unreachable_nats_is_not_one_that_refuses(
    facts: dict[str, Any], level: str, texts: tuple[str, ...]
) -> None:
    found = nats.check(NatsFacts(**facts), OsInfo())
    assert_finding(found[0], level, *texts)
    assert [f.level for f in found[1:]] == ["skipped", "skipped"]


@pytest.mark.parametrize(
    ("facts", "level", "texts"),
    [
        ({"servers": [msgspec.structs.replace(GOOD, version="2.10.29")]}, "problem", ("2.10.29", "2.11.0")),
        ({"servers": [msgspec.structs.replace(GOOD, max_payload_bytes=65536)]}, "problem", ("max_payload: 1MB",)),
        (
            {"servers": [GOOD, msgspec.structs.replace(GOOD, url="nats://m:4222", connect_error="timeout")]},
            "warning",
            ("nats://m:4222 cannot be reached",),
        ),
        (
            {"forbidden": ['Permissions Violation for Publish to "$JS.API.INFO"']},
            "problem",
            ("lack permissions", "allow"),
        ),
        ({"error": "timeout"}, "problem", ("JetStream does not",)),
        ({"no_jetstream": "not enabled"}, "problem", ("JetStream is off", "store_dir")),
        ({"monitor": JetStreamMonitor(GB, False, 120.0)}, "warning", ("every 120 s", "sync_interval: always")),
        ({"monitor": JetStreamMonitor(GB, True, 120.0)}, "ok", ("every write synced",)),
    ],
)
def test_an_unusable_nats_has_a_finding_with_what_to_change(
    facts: dict[str, Any], level: str, texts: tuple[str, ...]
) -> None:
    assert_finding(only(on(**facts), "nats"), level, *texts)


@pytest.mark.parametrize(
    ("text", "version"), [("2.11.0", (2, 11, 0)), ("2.11.0-RC.1", (2, 11, 0)), ("", (0, 0, 0)), ("dev", (0, 0, 0))]
)
def test_versions_of_nats_are_read(text: str, version: tuple[int, ...]) -> None:
    assert nats.version_of(text) == version


def test_a_finding_names_a_buckets_wrong_settings() -> None:
    found = only(on(streams=streams(storage=api.StorageType.MEMORY, max_bytes=1)), "streams")
    assert_finding(found, "problem", "KV_lease", "storage: ", "max_bytes: 1 instead of", "nats stream rm KV_lease")


def test_a_missing_or_unresponsive_stream_is_a_problem() -> None:
    [first, second, *rest] = streams()
    found = on(streams=[StreamStatus(first.expected), StreamStatus(second.expected, error="timeout"), *rest])
    [gone, silent] = [f for f in found if f.check == "streams"]
    assert_finding(gone, "problem", "there is no stream CMD")
    assert_finding(silent, "problem", "EVT does not answer: timeout")


@pytest.mark.parametrize(("share", "level"), [(0.5, "ok"), (0.85, "warning"), (0.99, "problem")])
def test_a_store_or_a_bucket_is_reported_before_it_is_full(share: float, level: str) -> None:
    assert only(on(store_max_bytes=1000, store_used_bytes=int(1000 * share)), "nats store").level == level
    assert (
        only(on(monitor=JetStreamMonitor(1000, True), store_used_bytes=int(1000 * share)), "nats store").level
        == level
    )
    for name, then in (("KV_state", level), ("EVT", "ok")):  # events are there to be discarded
        one = [
            StreamStatus(
                s.expected, s.actual, int(share * (s.expected.max_bytes or 0)) if s.expected.name == name else 0
            )
            for s in streams()
        ]
        assert only(on(streams=one), "nats store").level == then


# Clocks


@pytest.mark.parametrize(
    ("ahead_s", "within_s", "level", "texts"),
    [
        (0.2, 0.1, "ok", ()),
        (6.0, 2.0, "ok", ()),
        (9.0, 2.0, "warning", ("ahead of NATS's", "logs", "timedatectl")),
        (-400.0, 2.0, "warning", ("6 min 40 s behind",)),
        (-7200.0, 2.0, "problem", ("behind NATS's", "certificate")),
        (7200.0, 2.0, "problem", ("ahead of NATS's", "too soon or too late")),
    ],
)
def test_a_clock_that_is_off_shows_what_depends_on_it(
    ahead_s: float, within_s: float, level: str, texts: tuple[str, ...]
) -> None:
    assert_finding(only(clocks.check([ClockOffset("b", ahead_s, within_s)])), level, *texts)


def test_clocks_are_compared_with_nats_whoever_measured_them() -> None:
    offsets = clocks.against_nats(
        "a",
        ClockOffset("", 2.0, 0.1),
        {"a": ClockOffset("a", 9.0), "b": ClockOffset("b", -3.0, 1.5)},
        {"b": 50.0, "c": 60.0, "d": -1},
    )
    assert offsets == [
        ClockOffset("a", 2.0, 0.1),
        ClockOffset("b", -1.0, 1.6),
        ClockOffset("c", 60.0, 0.0, at_least=True),
    ]
    assert_finding(clocks.check([offsets[-1]])[0], "warning", "node c is at least 1 min 00 s ahead")


# Versions, ids, fileservers


def test_versions_that_differ_are_a_warning_and_majors_a_problem() -> None:
    same = {("a", "storage"): "1.2.0", ("a", "fetcher"): "1.2.0", ("b", "storage"): "1.2.0"}
    assert_finding(only(versions.check(same, "1.2.0")), "ok", "all 3 services")
    assert_finding(
        only(versions.check({**same, ("b", "storage"): "1.1.9"}, "1.2.0")), "warning", "storage of b", "1.1.9"
    )
    assert_finding(
        only(versions.check({**same, ("b", "storage"): "2.0.0"}, "1.2.0")), "problem", "storage of b", "2.0.0"
    )
    assert_finding(only(versions.check(same, "1.3.0")), "warning", "this command is version 1.3.0")
    assert_finding(only(versions.check(same, "0.9.0")), "problem", "this command is version 0.9.0")
    assert_finding(only(versions.check({}, "1.2.0")), "ok", "no service is up")


def holder(host: str) -> ProcessIdentity:
    return ProcessIdentity(uid="u", host=host, pid=1)


def test_one_id_on_two_machines_is_a_problem() -> None:
    one = {("a", "storage"): holder("m/b1/1"), ("a", "fetcher"): holder("m/b1/2")}
    assert only(duplicate_ids.check(one, "a", "m/b1/9", True)).level == "ok", "containers of one machine"
    two = {**one, ("a", "gateway"): holder("n/b2/1")}
    assert_finding(only(duplicate_ids.check(two, "x", "m/b1/9", True)), "problem", "node id a", "m, n", "node.toml")
    assert_finding(only(duplicate_ids.check(one, "a", "n/b2/9", True)), "problem", "node id a", "m, n")
    assert only(duplicate_ids.check(one, "a", "n/b2/9", False)).level == "ok", "a client's home may have that id"
    rebooted = {**one, ("a", "gateway"): holder("m/b2/1")}
    assert_finding(only(duplicate_ids.check(rebooted, "x", "m/b1/9", True)), "warning", "two boots of m")
    assert only(duplicate_ids.check({}, "a", "n/b2/9", True)).level == "ok"


def peer(
    node: str, *tried: AddressReach, published: tuple[str, ...] = ("10.0.0.2:9",), is_remote: bool = True
) -> FileserverReach:
    return FileserverReach(node=node, published=published, tried=tried, is_remote=is_remote)


WELL = AddressReach(address="10.0.0.2:9", status=200)
SILENT = AddressReach(address="10.0.0.1:9", error="timeout")


@pytest.mark.parametrize(
    ("found", "level", "texts"),
    [
        (peer("b", WELL), "ok", ("b at 10.0.0.2:9", "`shoal doctor` there tells")),
        (
            peer("b", AddressReach(address="10.0.0.2:9", error="timeout")),
            "problem",
            ("cannot be reached from here", "firewall"),
        ),
        (
            peer("b", AddressReach(address="10.0.0.2:9", status=401)),
            "problem",
            ("refuses our secret", "another secret"),
        ),
        (peer("b", AddressReach(address="10.0.0.2:9", status=404)), "problem", ("status 404", "another program")),
        (
            peer("b", AddressReach(address="10.0.0.1:9", error="timeout"), WELL),
            "warning",
            ("but not at the better 10.0.0.1:9",),
        ),
        (peer("b", published=("127.0.0.1:9",)), "problem", ("only addresses of its own machine", "--bind 0.0.0.0")),
        (peer("b", published=()), "problem", ("publishes no address",)),
    ],
)
def test_an_unreachable_fileserver_has_a_remedy(found: FileserverReach, level: str, texts: tuple[str, ...]) -> None:
    assert_finding(only(peers.check([found], "a", OsInfo())), level, *texts)


def test_a_node_that_others_cannot_reach_reports_itself() -> None:
    own = peer("a", AddressReach(address="127.0.0.1:9", status=200), published=("127.0.0.1:9",), is_remote=False)
    assert_finding(
        only(peers.check([own, peer("b", WELL)], "a", OsInfo())), "problem", "only loopback", "b cannot use"
    )
    assert only(peers.check([own], "a", OsInfo())).level == "ok", "alone it needs no other"
    assert only(peers.check([], "a", OsInfo())).level == "ok"


# Disk


FINE = FileSystemInfo(path="/s", kind="ext4", device=1, free_bytes=100 * GB, total_bytes=200 * GB)


def disks(**more: Any) -> list[Finding]:
    facts = {"store": FINE, "home": FINE, "store_exists": True, "storage_runs": True, "ballast_bytes": 1, **more}
    return disk.check(DiskFacts(**facts))


def changed(**more: Any) -> FileSystemInfo:
    return msgspec.structs.replace(FINE, **more)


def state(**more: Any) -> StorageState:
    return StorageState(**{"node": "a", "headroom_bytes": GB, **more})


@pytest.mark.parametrize(
    ("facts", "level", "texts"),
    [
        ({}, "ok", ("/s (ext4)", "100.0 GB free")),
        ({"store_exists": False, "storage_runs": False}, "ok", ("no store yet",)),
        ({"store_exists": False}, "problem", ("there is no store", "mounted")),
        ({"settings_error": "storage.path is 5"}, "problem", ("storage.path is 5",)),
        ({"store": changed(error="Permission denied")}, "problem", ("cannot be read", "storage.path")),
        ({"state": state(store_missing=True)}, "problem", ("unmounted", "mount it again")),
        ({"store": changed(kind="nfs4")}, "problem", ("nfs4", "locks")),
        ({"store": changed(read_only=True)}, "problem", ("read-only", "dmesg")),
        ({"store": changed(inodes_total=10**6, inodes_free=500)}, "warning", ("500 inodes left",)),
        ({"store": changed(inodes_total=10**6, inodes_free=0)}, "problem", ("0 inodes left",)),
        ({"store": changed(free_bytes=GB // 2)}, "problem", ("no model fits", "shoal gc")),
        ({"store": changed(free_bytes=5 * GB), "state": state(headroom_bytes=6 * GB)}, "problem", ("6.0 GB",)),
        ({"store": changed(free_bytes=3 * GB), "state": state(headroom_bytes=2 * GB)}, "warning", ("small models",)),
        ({"state": state(quota_bytes=100, used_bytes=90, reserved_bytes=9)}, "warning", ("refused", "lru")),
        ({"state": state(quota_bytes=100, used_bytes=99, eviction_policy="lru")}, "ok", ()),
        ({"ballast_bytes": 0}, "warning", ("no ballast file",)),
        ({"ballast_bytes": 0, "ballast_target_bytes": 0}, "ok", ()),
        ({"ballast_bytes": 0, "storage_runs": False}, "ok", ()),
        ({"home": changed(path="/h", device=2, free_bytes=1)}, "problem", ("the disk of /h", "logs")),
    ],
)
def test_a_disk_finding_names_what_keeps_models_out(
    facts: dict[str, Any], level: str, texts: tuple[str, ...]
) -> None:
    assert_finding(only(disks(**facts), "disk"), level, *texts)


def test_usage_over_quota_is_reported_under_lru_too() -> None:
    found = only(disks(state=state(quota_bytes=100, used_bytes=120, eviction_policy="lru")), "disk")
    assert found.level == "warning" and "evicts others first" in found.what


def test_ballast_lost_to_a_full_disk_is_reported_with_the_disk() -> None:
    found = [f for f in disks(ballast_bytes=0, store=changed(free_bytes=GB + 1)) if f.check == "disk"]
    assert len(found) == 2 and "deleted it" in found[1].what


@pytest.mark.parametrize(
    ("facts", "level", "texts"),
    [
        ({}, "ok", ("no volumes or libraries",)),
        ({"volumes": [FINE], "libraries": [FINE]}, "ok", ("2 volumes and libraries",)),
        ({"volumes": [changed(exists=False)]}, "problem", ("not used", "--remove-volume /s")),
        (
            {"volumes": [FINE], "state": state(volumes=[VolumeState(path="/s", error="away")])},
            "problem",
            ("away",),
        ),
        ({"volumes": [changed(read_only=True)]}, "problem", ("the volume", "read-only")),
        ({"volumes": [changed(free_bytes=1)]}, "warning", ("nothing more is stored there",)),
        ({"libraries": [changed(exists=False)]}, "warning", ("cannot be read", "--remove-library /s")),
        (
            {"libraries": [FINE], "state": state(libraries=[LibraryState(path="/s", error="not UTF-8")])},
            "warning",
            ("not UTF-8",),
        ),
    ],
)
def test_a_missing_volume_is_reported(facts: dict[str, Any], level: str, texts: tuple[str, ...]) -> None:
    assert_finding(only(disks(**facts), "volumes"), level, *texts)


def test_the_doctors_copy_of_storage_defaults_is_right() -> None:
    assert disk.DEFAULT_HEADROOM_BYTES == settings.DEFAULT_HEADROOM_BYTES
    assert disk.DEFAULT_BALLAST_BYTES == settings.DEFAULT_BALLAST_BYTES
    assert disk.BALLAST_FREE_FACTOR == ballast._MIN_FREE_MULTIPLE


# Permissions, memory, open files


def entry(**more: Any) -> PathPermission:
    return PathPermission(**{"path": "/h/secret", "mode": 0o600, "owner": "me", "private": True, **more})


@pytest.mark.parametrize(
    ("facts", "level", "texts"),
    [
        ({"owner": "me", "entries": [entry()]}, "ok", ("only its owner",)),
        ({}, "ok", ("/h does not exist yet",)),
        ({"creatable": False}, "problem", ("cannot create /h",)),
        ({"owner": "you"}, "warning", ("belongs to you", "sudo -u you shoal doctor --home /h")),
        ({"read_error": "Permission denied"}, "warning", ("another user",)),
        ({"owner": "me", "entries": [entry(mode=0o644)]}, "problem", ("0644", "chmod go= /h/secret")),
        ({"owner": "me", "entries": [entry(mode=0o755, private=False)]}, "ok", ()),
        ({"owner": "me", "entries": [entry(writable=False)]}, "problem", ("cannot write", "chmod u+rwX")),
        ({"owner": "me", "entries": [entry(owner="root", writable=False)]}, "problem", ("sudo chown -R me",)),
    ],
)
def test_permissions_that_get_in_the_way_are_reported(
    facts: dict[str, Any], level: str, texts: tuple[str, ...]
) -> None:
    assert_finding(only(permissions.check(PermissionFacts(**{"home": "/h", "user": "me", **facts}))), level, *texts)


@pytest.mark.parametrize(
    ("facts", "level", "texts"),
    [
        ({}, "ok", ("32.0 GB of 64.0 GB",)),
        ({"cap_bytes": 24 * GB}, "ok", ("at most 24.0 GB",)),
        ({"cap_bytes": 80 * GB}, "warning", ("has no effect",)),
        ({"cap_error": "max_memory_bytes 'much' is not a number"}, "problem", ("'much'",)),
        ({"machine_bytes": 128 * GB}, "ok", ("32.0 GB of 64.0 GB", "control group", "of 128.0 GB")),
        ({"machine_bytes": 128 * GB, "cap_bytes": 80 * GB}, "warning", ("has no effect", "64.0 GB")),
        ({"available_bytes": GB}, "warning", ("1.0 GB of 64.0 GB",)),
    ],
)
def test_memory_that_differs_from_placements_view_is_reported(
    facts: dict[str, Any], level: str, texts: tuple[str, ...]
) -> None:
    made = MemoryFacts(**{"total_bytes": 64 * GB, "available_bytes": 32 * GB, **facts})
    assert_finding(only(machine.check_memory(made)), level, *texts)


@pytest.mark.parametrize(
    ("opened", "level", "texts"),
    [
        (OpenFiles("fileserver", 4096, 10), "ok", ("4096",)),
        (OpenFiles("fileserver", -1, 10), "ok", ("no limit",)),
        (OpenFiles("fileserver", 256, 10), "problem", ("256", "ulimit -n", "LimitNOFILE")),
        (OpenFiles("fileserver", 1000, 10), "warning", ("1000",)),
        (OpenFiles("fileserver", 1024, 1000), "warning", ("and has 1000",)),
    ],
)
def test_a_too_low_open_file_limit_is_reported(opened: OpenFiles, level: str, texts: tuple[str, ...]) -> None:
    assert_finding(only(machine.check_files([opened])), level, *texts)


# What is printed, and the servers that are asked


MIXED = [
    Finding("ports", "problem", "taken", "stop it"),
    Finding("nats", "skipped", "not checked: why"),
    Finding("streams", "skipped", "not checked: why"),
    Finding("disk", "warning", "little room", "make some"),
    Finding("services", "ok", "all run"),
]


def test_what_is_worst_comes_last_and_decides_the_exit_code() -> None:
    console = Console(width=200)
    with console.capture() as printed:
        render.print_report(DoctorReport("/h", "a", MIXED), console)
    lines = printed.get().splitlines()
    assert [line.split()[0] for line in lines] == ["ok", "skipped", "warning", "→", "problem", "→", "node"]
    assert "nats, streams: not checked: why" in lines[1]
    assert lines[-1].endswith("1 problem, 1 warning, 2 not checked")
    assert finding.exit_code(MIXED) == 1 and finding.exit_code(MIXED[1:]) == 0
    document = render.to_json(DoctorReport("/h", "a", MIXED), "1.0")
    assert document["worst"] == "problem" and len(document["findings"]) == len(MIXED)


@given(width=st.integers(20, 200))
def test_every_word_of_a_finding_is_printed_at_any_width(width: int) -> None:
    text = "a much longer account of what is the matter with /some/path/to/a/thing than fits into one line"
    console = Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as printed:
        render.print_report(DoctorReport("/h", "a", [Finding("disk", "problem", text, text)]), console)
    assert printed.get().replace("\n", " ").split().count("/some/path/to/a/thing") <= 2
    assert "".join(text.split()) in "".join(printed.get().split())


def test_every_check_has_its_place_in_the_page() -> None:
    made = {
        value
        for module in (clocks, disk, duplicate_ids, machine, nats, peers, permissions, ports, services, versions)
        for name, value in vars(module).items()
        if name in ("CHECK", "DISK", "VOLUMES", "MEMORY", "LIMITS", "NATS", "STREAMS", "NATS_STORE")
    }
    assert made == set(CHECKS)


def test_servers_come_from_the_supervisor_with_given_credentials() -> None:
    up = SupervisorStatus(
        node="a",
        pid=1,
        started_at_s=0,
        stopping=False,
        nats=["nats://n:4222"],
        gateway="",
        logs="",
        children=[child("nats")],
    )
    assert servers_of(up, {}, {}) == (["nats://n:4222"], True)
    assert servers_of(up, {}, {"nats": ["nats://u:p@n:4222"]}) == (["nats://u:p@n:4222"], True)
    assert servers_of(None, {}, {}) == (["nats://127.0.0.1:4222"], True)
    assert servers_of(None, {"SHOAL_NATS": "n:1, nats://m:2"}, {"nats": ["x"]}) == (
        ["nats://n:1", "nats://m:2"],
        False,
    )
    assert servers_of(None, {}, {"nats": "wrong"}) == (["nats://127.0.0.1:4222"], True)
    assert with_secret("nats://n:4222", "s") == "nats://s@n:4222"
    assert with_secret("nats://t@n:4222", "s") == "nats://t@n:4222"
