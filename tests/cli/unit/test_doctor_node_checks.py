"""Findings about nodes: clocks, versions, ids, peers, permissions, memory and open files; and the page."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from shoal_cli.doctor import finding, render
from shoal_cli.doctor.checks import (
    clocks,
    disk,
    duplicate_ids,
    machine,
    models,
    nats,
    nodes,
    peers,
    permissions,
    ports,
    services,
    versions,
)
from shoal_cli.doctor.checks.clocks import ClockOffset
from shoal_cli.doctor.checks.machine import MemoryFacts, OpenFiles
from shoal_cli.doctor.checks.peers import AddressReach, FileserverReach, PortReach
from shoal_cli.doctor.checks.permissions import PathPermission, PermissionFacts
from shoal_cli.doctor.finding import Finding
from shoal_cli.doctor.reachability import ConnectError, OsInfo
from shoal_cli.doctor.run import CHECKS, DoctorReport
from shoal_common.messages.liveness import ProcessIdentity
from tests.cli.unit.test_doctor_checks import GB, assert_finding, only

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


def port_of_b(service: str, error: ConnectError, number: int = 8082) -> PortReach:
    return PortReach(node="b", service=service, tried=[AddressReach(address=f"10.0.0.2:{number}", error=error)])


def test_a_closed_port_of_another_node_is_named() -> None:
    ports = [port_of_b("stages", "timeout"), port_of_b("stages", "timeout", 8097), port_of_b("gateway", "", 8080)]
    assert_finding(only(peers.check_ports(ports, OsInfo())), "problem", "TCP 8082, 8097 of node b", "firewall")
    assert_finding(only(peers.check_ports([port_of_b("stage", "refused")], OsInfo())), "problem", "node b (stage)")
    assert_finding(
        only(peers.check_ports([port_of_b("gateway", "no_route")], OsInfo())), "warning", "node b (gateway)"
    )


def test_where_no_stage_listens_a_refusal_is_an_open_way() -> None:
    assert_finding(only(peers.check_ports([port_of_b("stages", "refused")], OsInfo())), "ok", "stages of b")
    assert_finding(only(peers.check_ports([], OsInfo())), "ok", "no other node")


def nodes_seen(**more: Any) -> list[Finding]:
    facts = {"node": "a", "members": ["a", "b"], "live": {"a"}, "down_since_s": {"b": 86400.0}}
    return nodes.check(nodes.NodesFacts(**{**facts, **more}))


def test_a_node_that_is_gone_is_named_with_what_lacks_it() -> None:
    assert_finding(only(nodes_seen()), "warning", "node b is down since 1970-01-02", "shoal node revoke b")
    assert_finding(only(nodes_seen(down_since_s={})), "warning", "node b is down", "shoal node forget b")
    assert_finding(only(nodes_seen(live={"a", "b"})), "warning", "node b is down since 1970-01-02")
    assert_finding(only(nodes_seen(live={"a", "b"}, down_since_s={})), "ok", "up: a, b")
    assert_finding(only(nodes_seen(members=[], down_since_s={})), "ok", "up: a")
    node, instance = nodes_seen(lacking={"i1": "node b is down since 1970-01-02T00:00:00+00:00"})
    assert_finding(node, "problem", "node b is down since 1970-01-02", "shoal node forget b")
    assert_finding(instance, "problem", "instance i1 cannot answer: node b is down", "shoal rebalance i1")


def test_a_first_node_on_loopback_keeps_its_members_out() -> None:
    found = nodes_seen(bind="127.0.0.1", runs_nats=True)
    assert [f.level for f in found] == ["warning", "problem"]
    assert "listens on 127.0.0.1 only" in found[1].what and "--bind 0.0.0.0" in found[1].remedy
    assert only(nodes_seen(live={"a", "b"}, down_since_s={}, bind="127.0.0.1", runs_nats=True)).level == "ok"


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
        ({"settings_errors": ["inference.max_memory_bytes in node.toml is 'much'"]}, "problem", ("'much'",)),
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
        for module in (
            clocks,
            disk,
            duplicate_ids,
            machine,
            models,
            nodes,
            nats,
            peers,
            permissions,
            ports,
            services,
            versions,
        )
        for name, value in vars(module).items()
        if name in ("CHECK", "DISK", "VOLUMES", "MEMORY", "LIMITS", "NATS", "STREAMS", "NATS_STORE", "NODE_PORTS")
    }
    assert made == set(CHECKS)
