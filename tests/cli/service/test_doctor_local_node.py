"""`shoal doctor` about this machine's own node: its home, port, secret, settings, services and supervisor."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from shoal_cli.doctor.finding import exit_code
from shoal_cli.doctor.run import run_checks
from shoal_cli.node_home import Home
from shoal_common import VERSION
from shoal_common.identity.api_key import api_key_path, ensure_api_key
from tests.cli.conftest import Node as StandInNode
from tests.cli.conftest import wait_until
from tests.cli.doctor_fixtures import (
    RUN_DEADLINE_S,
    clean_environment,
    findings_about,
    listening,
    only_finding,
    probe,
    run_doctor,
)
from tests.harness.nats import NatsServer, joined
from tests.harness.node import Node, running_nodes
from tests.harness.process import source_path
from tests.harness.shoal import ShoalCluster

# Nothing there


def test_nothing_at_all_is_no_problem_and_nothing_is_made(tmp_path: Path) -> None:
    report = run_checks(Home(tmp_path / "none"), clean_environment(SHOAL_NATS=""))
    assert (
        only_finding(report, "services").level == "warning"
        and "no node was ever started" in only_finding(report, "services").what
    )
    # The other checks look at this machine's own ports, memory and disk, of which a test knows nothing.
    assert {only_finding(report, c).level for c in ("permissions", "volumes")} == {"ok"}
    assert not (tmp_path / "none").exists()


def test_a_node_that_is_not_running_is_a_problem(home: Home) -> None:
    before = sorted(home.root.rglob("*"))
    report = run_checks(home, clean_environment())
    assert (
        only_finding(report, "services").level == "problem"
        and "node a is not running" in only_finding(report, "services").what
    )
    assert exit_code(report.findings) == 1
    assert sorted(home.root.rglob("*")) == before, "looking changed something"


def test_a_home_that_hangs_does_not_hang_the_doctor(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "lock")  # opening it waits for a writer, for ever
    done = run_doctor(tmp_path)
    assert done.returncode == 1 and "no answer within" in done.stdout


# Ports, permissions, disks


def test_a_port_that_is_taken_is_reported_with_its_owner(home: Home) -> None:
    with listening() as port:
        found = only_finding(
            run_checks(
                home, {**clean_environment(), "SHOAL_NATS": "nats://127.0.0.1:1", "SHOAL_GATEWAY_PORT": str(port)}
            ),
            "ports",
        )
    assert found.level == "problem" and found.about == f"port {port}"
    assert f"pid {os.getpid()}" in found.what, "the test itself listens there"


def test_a_secret_that_others_may_read_is_reported(home: Home) -> None:
    key = api_key_path(home.root)
    ensure_api_key(home.root)
    assert only_finding(probe(home, "nats://127.0.0.1:1"), "permissions").level == "ok"
    key.chmod(0o644)
    found = only_finding(probe(home, "nats://127.0.0.1:1"), "permissions")
    assert found.level == "problem" and found.about == str(key) and "0644" in found.what


def test_an_unreadable_settings_file_is_reported(home: Home) -> None:
    (home.root / "node.toml").write_text("id = ")
    assert any(
        "node.toml cannot be read" in f.what for f in findings_about(probe(home, "nats://127.0.0.1:1"), "disk")
    )


def test_unmounted_volumes_and_libraries_are_reported(home: Home, tmp_path: Path) -> None:
    volumes = home.root / "store" / "volumes"
    volumes.mkdir(parents=True)
    (volumes / ("0" * 16)).symlink_to(tmp_path / "unmounted")
    (home.root / "node.toml").write_text(f'id = "a"\n[storage]\nlibraries = ["{tmp_path / "cache"}"]\n')
    found = {f.about: f.level for f in findings_about(probe(home, "nats://127.0.0.1:1"), "volumes")}
    assert found == {str(tmp_path / "unmounted"): "problem", str(tmp_path / "cache"): "warning"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_sees_whose_node_it_is(home: Home) -> None:
    home.root.chmod(0o700)
    # Another user may not be able to read the tree's modules: they are loaded before becoming it.
    become = (
        "import os, sys, shoal_cli.commands.doctor, shoal_cli.doctor.render; from shoal_cli.cli import run; "
        "os.setgid(65534); os.setuid(65534); sys.exit(run(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", become, "doctor", "--json", "--home", str(home.root)],
        env={**clean_environment(SHOAL_NATS="nats://127.0.0.1:1"), "PYTHONPATH": source_path()},
        capture_output=True,
        text=True,
        timeout=RUN_DEADLINE_S,
        check=False,
    )
    [found] = [f for f in json.loads(done.stdout)["findings"] if f["check"] == "permissions"]
    assert found["level"] == "warning" and ", this is " in found["what"], found


def test_a_service_that_does_not_start_shows_its_logs_end(node: StandInNode) -> None:
    node.behave(storage="breaks")
    node.up()

    def tried() -> bool:
        return any(c.name == "storage" and c.last_exit_code == 3 for c in node.status().children)

    wait_until(tried, "storage has ended once")
    report = run_checks(node.home, clean_environment())
    found = [f for f in findings_about(report, "services") if f.about == "storage"]
    assert found and found[0].level == "problem" and "exit code 3" in found[0].what
    assert "frobnicator" in found[0].remedy
    # Stand-ins say nothing to the cluster: that too is seen.
    assert any("does not see it" in f.what for f in findings_about(report, "services") if f.about == "fetcher")


def test_a_supervisor_that_does_not_answer_is_reported(node: StandInNode) -> None:
    node.up()
    pid = node.status().pid
    os.kill(pid, signal.SIGSTOP)
    try:
        found = only_finding(run_checks(node.home, clean_environment()), "services")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert found.level == "problem" and f"pid {pid}" in found.what and "does not answer" in found.what


async def test_services_without_a_supervisor_are_seen_by_liveness(own_nats: NatsServer, tmp_path: Path) -> None:
    with running_nodes(Node(tmp_path / "a", "a", own_nats.url, ("storage", "fileserver"))) as [node]:
        async with joined(own_nats) as here:
            await node.ready(here)
        report = await asyncio.to_thread(probe, Home(node.home), own_nats)
        assert only_finding(report, "services").what.startswith("the cluster sees fileserver, storage")
        assert only_finding(report, "fileservers").level == "ok"
        assert "fileserver " in only_finding(report, "ports").what and only_finding(report, "ports").level == "ok"
        node["fileserver"].send(signal.SIGSTOP)
        try:
            report = await asyncio.to_thread(probe, Home(node.home), own_nats)
        finally:
            node["fileserver"].send(signal.SIGCONT)
        found = only_finding(report, "fileservers")
        assert found.level == "problem" and "does not answer" in found.what


def test_healthy_nodes_are_ok_and_a_killed_nats_is_reported(tmp_path: Path) -> None:
    with ShoalCluster(tmp_path, "http://127.0.0.1:9", ("a", "b")) as nodes:
        for name in ("a", "b"):
            report = json.loads(nodes[name].shoal("doctor", "--json").stdout)
            assert report["node"] == name and report["version"] == VERSION
            levels: Mapping[str, str] = {f["check"]: f["level"] for f in report["findings"]}
            for check in (
                "services",
                "ports",
                "nats",
                "streams",
                "nats store",
                "fileservers",
                "versions",
                "node ids",
            ):
                assert levels[check] == "ok", (check, report)
        printed = nodes["b"].shoal("doctor")
        assert printed.returncode == int(report["worst"] == "problem"), "this machine's own disk may be full"
        assert "node b, " in printed.stdout.splitlines()[-1]

        pid = nodes["a"].child("nats").pid
        os.kill(pid, signal.SIGSTOP)
        try:
            printed = nodes["b"].shoal("doctor", timeout_s=RUN_DEADLINE_S)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert printed.returncode == 1 and "problem  nats" in printed.stdout, printed.stdout
