"""What `shoal doctor` makes of facts: every finding, without any I/O."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nats.js import api

from shoal_cli.doctor import checks
from shoal_cli.doctor.checks import (
    nats,
    ports,
    services,
)
from shoal_cli.doctor.checks.nats import JetStreamSettings, NatsFacts, NatsServerInfo, StreamStatus
from shoal_cli.doctor.checks.ports import ExpectedPort, PortListener
from shoal_cli.doctor.checks.services import ServiceFacts, SystemdUnit
from shoal_cli.doctor.finding import Finding
from shoal_cli.doctor.probes.local_node import servers_of
from shoal_cli.doctor.probes.systemd_units import parse
from shoal_cli.doctor.reachability import ConnectError, OsInfo, connect_remedy, describe
from shoal_cli.node.children.restart_policy import ChildStatus
from shoal_cli.node.control import SupervisorStatus
from shoal_common.bus.streams import stream_configs
from shoal_common.host.interfaces import Interface

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
def test_each_connect_error_has_a_remedy(error: ConnectError, address: str, system: OsInfo, text: str) -> None:
    assert text in connect_remedy(error, address, system, "the other")
    assert describe(error, "")


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
        (
            {"servers": [GOOD], "denied": "Authorization Violation"},
            "problem",
            ("refuses our", "shoal leave"),
        ),
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
        ({"settings": JetStreamSettings(GB, False, 120.0)}, "warning", ("every 120 s", "sync_interval: always")),
        ({"settings": JetStreamSettings(GB, True, 120.0)}, "ok", ("every write synced",)),
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
        only(on(settings=JetStreamSettings(1000, True), store_used_bytes=int(1000 * share)), "nats store").level
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
    assert servers_of(up, {}, {}, False) == (["nats://n:4222"], True)
    assert servers_of(up, {}, {"nats": ["nats://u:p@n:4222"]}, False) == (["nats://u:p@n:4222"], True)
    assert servers_of(None, {}, {}, False) == (["nats://127.0.0.1:4222"], True)
    assert servers_of(None, {"SHOAL_NATS": "n:1, nats://m:2"}, {"nats": ["x"]}, False) == (
        ["nats://n:1", "nats://m:2"],
        False,
    )
    assert servers_of(None, {}, {"nats": "wrong"}, True) == (["tls://127.0.0.1:4222"], True)
    joined = {"cluster": {"nats": ["tls://n:4222"]}}
    assert servers_of(None, {}, joined, True) == (["tls://n:4222"], False)
