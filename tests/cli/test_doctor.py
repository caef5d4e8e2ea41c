"""`shoal doctor` against real servers, processes and files: problems that are really there."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from nats.js import api

from shoal_cli.doctor.finding import Finding, exit_code
from shoal_cli.doctor.run import DoctorReport, run_checks
from shoal_cli.node.ports import free_port
from shoal_cli.node_home import Home
from shoal_common import VERSION
from shoal_common.bus.keys import liveness_key
from shoal_common.bus.streams import stream_configs
from shoal_common.host.process_identity import this_process
from shoal_common.messages.liveness import LivenessRecord, NodeFacts, ProcessIdentity
from tests.cli.conftest import Node as StandInNode
from tests.cli.conftest import wait_until
from tests.harness import nats as nats_harness
from tests.harness.nats import Joined, NatsServer, joined
from tests.harness.node import Node, running_nodes
from tests.harness.process import source_path
from tests.harness.shoal import ShoalCluster

RUN_DEADLINE_S = 90.0


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home in which a node was once made, and does not run."""
    root = tmp_path / "home"
    root.mkdir()
    (root / "node.toml").write_text('id = "a"\n')
    return Home(root)


def clean_environment(**more: str) -> dict[str, str]:
    """An environment in which no port of this machine's own Shoal matters."""
    return {"SHOAL_GATEWAY_PORT": str(free_port("127.0.0.1")), "PATH": os.environ.get("PATH", ""), **more}


def probe(home: Home, server: NatsServer | str, **more: str) -> DoctorReport:
    url = server if isinstance(server, str) else server.url
    return run_checks(home, clean_environment(SHOAL_NATS=url, **more))


def findings_about(report: DoctorReport, check: str) -> list[Finding]:
    return [f for f in report.findings if f.check == check]


def only_finding(report: DoctorReport, check: str) -> Finding:
    [one] = findings_about(report, check)
    return one


def cluster(server: NatsServer, work: Callable[[Joined], Awaitable[None]]) -> None:
    """Do something to the cluster as its nodes would."""

    async def run() -> None:
        async with joined(server) as here:
            await work(here)

    asyncio.run(run())


def put_liveness(server: NatsServer, *entries: tuple[str, str, LivenessRecord]) -> None:
    """Write liveness values, as services of nodes elsewhere do."""

    async def write(here: Joined) -> None:
        for node, service, live in entries:
            await here.buckets.live.put(liveness_key(node, service), live)

    cluster(server, write)


def liveness_elsewhere(host: str = "other/boot/1", **more: Any) -> LivenessRecord:
    """What a service on another machine says."""
    who = ProcessIdentity(uid="u1", host=host, pid=4711, network_namespace="another")
    return LivenessRecord(**{"holder": who, "version": VERSION, "started_at_s": time.time() - 100, **more})


@contextmanager
def listening(answer: bytes | None = None) -> Iterator[int]:
    """A program that has a port, and says this to whoever comes; nothing, if None."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    taken.append(server.accept()[0])
                except OSError:
                    return
                if answer is not None:
                    taken[-1].sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield int(server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
        thread.join(RUN_DEADLINE_S)
        for connection in taken:
            connection.close()


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


def test_an_unreachable_nats_is_one_problem_and_checks_go_on(home: Home) -> None:
    port = free_port("127.0.0.1")
    report = probe(home, f"nats://127.0.0.1:{port}")
    found = only_finding(report, "nats")
    assert found.level == "problem" and "nothing listens there" in found.what and str(port) in found.what
    for check in ("streams", "nats store", "clocks", "fileservers", "node ids", "versions"):
        assert only_finding(report, check).level == "skipped", check
    for check in ("disk", "memory", "open files", "permissions", "ports"):
        assert only_finding(report, check).level != "skipped", check


def test_a_host_name_that_does_not_resolve_is_reported(home: Home) -> None:
    found = only_finding(probe(home, "nats://no-such-host.invalid:4222"), "nats")
    assert found.level == "problem"


def test_a_program_that_is_no_nats_is_reported_talking_or_silent(home: Home) -> None:
    with listening(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        found = only_finding(probe(home, f"nats://127.0.0.1:{port}"), "nats")
        assert found.level == "problem" and "it is not a NATS server" in found.what
    with listening(None) as port:
        found = only_finding(probe(home, f"nats://127.0.0.1:{port}"), "nats")
        assert found.level == "problem" and "does not answer" in found.what


def test_a_home_that_hangs_does_not_hang_the_doctor(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "node.toml")  # reading it waits for a writer, for ever
    done = run_doctor(tmp_path)
    assert done.returncode == 1 and "no answer within" in done.stdout


# A NATS that is there


def test_a_healthy_cluster_only_warns_that_this_node_is_stopped(home: Home, own_nats: NatsServer) -> None:
    cluster(own_nats, _nothing)
    report = probe(home, own_nats)
    for check in ("nats", "streams", "nats store", "clocks", "fileservers", "node ids", "versions"):
        assert only_finding(report, check).level == "ok", only_finding(report, check)


async def _nothing(_: Joined) -> None:
    return


def test_a_nats_without_streams_is_reported_as_lacking_them(home: Home, own_nats: NatsServer) -> None:
    report = probe(home, own_nats)
    assert {f.about for f in findings_about(report, "streams")} == {f"stream {c.name}" for c in stream_configs(1)}
    assert {f.level for f in findings_about(report, "streams")} == {"problem"}


def test_a_bucket_with_other_settings_is_a_problem_naming_them(home: Home, own_nats: NatsServer) -> None:
    async def change(here: Joined) -> None:
        [found] = [c for c in stream_configs(1) if c.name == "KV_done"]
        found.max_age, found.duplicate_window, found.max_bytes = 60, 60, 1 << 20
        await here.js.update_stream(found)
        await here.js.delete_stream("KV_lease")
        await here.js.add_stream(
            api.StreamConfig(name="KV_lease", subjects=["$KV.lease.>"], storage=api.StorageType.MEMORY)
        )

    cluster(own_nats, change)
    found = {f.about: f.what for f in findings_about(probe(home, own_nats), "streams") if f.level == "problem"}
    assert set(found) == {"stream KV_done", "stream KV_lease"}
    assert "max_age: 60.0 instead of 3600" in found["stream KV_done"]
    assert "storage: memory instead of file" in found["stream KV_lease"]


def served(monkeypatch: pytest.MonkeyPatch, directory: Path, more: str, jetstream: bool = True) -> NatsServer:
    """A server with further settings."""
    text = nats_harness._SETTINGS if jetstream else nats_harness._SETTINGS.split("jetstream")[0]
    monkeypatch.setattr(nats_harness, "_SETTINGS", text + more)
    return NatsServer(directory / "nats")


def test_a_nats_with_another_secret_is_refused_and_not_down(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(monkeypatch, tmp_path, 'authorization {{ token: "the-right-secret" }}\n') as server:
        for more in ({}, {"SHOAL_SECRET": "the-wrong-secret"}):
            found = only_finding(probe(home, server, **more), "nats")
            assert found.level == "problem" and "refuses our credentials" in found.what, found
        assert only_finding(probe(home, server, SHOAL_SECRET="the-right-secret"), "nats").level == "ok"
        home.write_secret("the-right-secret")
        assert only_finding(probe(home, server), "nats").level == "ok", "the home's own secret is used"


def test_a_denied_permission_is_reported_and_not_as_a_timeout(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = 'authorization {{ users: [ {{ user: u, password: p, permissions: {{ publish: ["foo"] }} }} ] }}\n'
    with served(monkeypatch, tmp_path, user) as server:
        found = only_finding(probe(home, server.url.replace("nats://", "nats://u:p@")), "nats")
    assert found.level == "problem" and "lack permissions that Shoal needs" in found.what
    assert "$JS.API.INFO".lower() in found.what.lower()


def test_a_nats_without_jetstream_is_reported(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(monkeypatch, tmp_path, "", jetstream=False) as server:
        report = probe(home, server)
    assert only_finding(report, "nats").level == "problem" and "JetStream is off" in only_finding(report, "nats").what
    assert only_finding(report, "streams").level == "skipped"


def test_a_nats_with_periodic_sync_is_a_warning_if_monitored(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        nats_harness, "_SETTINGS", nats_harness._SETTINGS.replace("sync_interval: always", 'sync_interval: "2m"')
    )
    home.run.mkdir()
    with served(monkeypatch, tmp_path, 'http: "127.0.0.1:-1"\n') as server:
        cluster(server, _nothing)
        for file in server.directory.glob("*.ports"):  # where a node's own server tells its ports
            (home.run / file.name).write_bytes(file.read_bytes())
        report = probe(home, server)
    assert only_finding(report, "nats").level == "warning" and "every 120 s" in only_finding(report, "nats").what
    assert "1.1 GB" in only_finding(report, "nats store").what


# What the nodes say of themselves


def test_another_version_of_a_node_is_reported(home: Home, own_nats: NatsServer) -> None:
    same = [("b", "storage", liveness_elsewhere()), ("d", "storage", liveness_elsewhere("third/boot/1"))]
    put_liveness(own_nats, *same, ("c", "storage", liveness_elsewhere(version="7.0.0")))
    found = only_finding(probe(home, own_nats), "versions")
    assert found.level == "problem" and "storage of c: version 7.0.0" in found.what
    newer = f"{VERSION.rpartition('.')[0]}.99"
    put_liveness(own_nats, ("c", "storage", liveness_elsewhere(version=newer)))
    found = only_finding(probe(home, own_nats), "versions")
    assert found.level == "warning" and f"storage of c: version {newer}" in found.what


def test_a_clock_that_is_ahead_shows_in_a_liveness_value(home: Home, own_nats: NatsServer) -> None:
    put_liveness(
        own_nats,
        ("b", "storage", liveness_elsewhere(started_at_s=time.time() + 7200)),
        ("c", "storage", liveness_elsewhere("third/boot/1")),
    )
    found = only_finding(probe(home, own_nats), "clocks")
    assert (
        found.level == "problem"
        and found.about == "node b"
        and "is at least " in found.what
        and "ahead of NATS" in found.what
    )


def test_a_slow_clock_shows_in_the_nodes_fileserver_replies(home: Home, own_nats: NatsServer) -> None:
    late = b"HTTP/1.1 200 OK\r\ndate: Thu, 01 Jan 2026 00:00:00 GMT\r\ncontent-length: 3\r\n\r\nok\n"
    with listening(late) as port:
        own = LivenessRecord(holder=this_process(), version=VERSION, facts=NodeFacts(addresses=[f"127.0.0.1:{port}"]))
        put_liveness(own_nats, ("b", "fileserver", own))
        report = probe(home, own_nats)
    assert (
        "node b" in findings_about(report, "clocks")[0].what and "behind" in findings_about(report, "clocks")[0].what
    )


def test_a_stranger_s_clock_is_not_taken_for_a_fileserver_s(home: Home, own_nats: NatsServer) -> None:
    strange = b"HTTP/1.1 404 Not Found\r\ndate: Thu, 01 Jan 2026 00:00:00 GMT\r\ncontent-length: 0\r\n\r\n"
    with listening(strange) as port:
        own = LivenessRecord(holder=this_process(), version=VERSION, facts=NodeFacts(addresses=[f"127.0.0.1:{port}"]))
        put_liveness(own_nats, ("b", "fileserver", own))
        report = probe(home, own_nats)
    assert only_finding(report, "clocks").level == "ok"
    assert "another program" in only_finding(report, "fileservers").remedy


def test_one_node_id_on_two_machines_is_reported(home: Home, own_nats: NatsServer) -> None:
    put_liveness(
        own_nats, ("b", "storage", liveness_elsewhere()), ("b", "fetcher", liveness_elsewhere("third/boot2/1"))
    )
    found = only_finding(probe(home, own_nats), "node ids")
    assert found.level == "problem" and "b is used on several machines: other, third" in found.what


def test_an_unreachable_fileserver_is_reported(home: Home, own_nats: NatsServer) -> None:
    closed = free_port("127.0.0.1")
    here = LivenessRecord(holder=this_process(), version=VERSION, facts=NodeFacts(addresses=[f"127.0.0.1:{closed}"]))
    there = liveness_elsewhere(facts=NodeFacts(addresses=[]))
    put_liveness(own_nats, ("b", "fileserver", here), ("c", "fileserver", there))
    found = {f.about: f for f in findings_about(probe(home, own_nats), "fileservers")}
    assert "nothing listens there" in found["node b"].what and str(closed) in found["node b"].what
    assert "publishes no address" in found["node c"].what


def test_services_elsewhere_with_this_node_id_are_not_ours(home: Home, own_nats: NatsServer) -> None:
    put_liveness(own_nats, ("a", "storage", liveness_elsewhere()))
    assert "is not running" in only_finding(probe(home, own_nats), "services").what


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
    home.write_secret("0123456789abcdef")
    assert all(f.about != str(home.secret) for f in findings_about(probe(home, "nats://127.0.0.1:1"), "permissions"))
    home.secret.chmod(0o644)
    found = only_finding(probe(home, "nats://127.0.0.1:1"), "permissions")
    assert found.level == "problem" and found.about == str(home.secret) and "0644" in found.what


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


# Nodes that run


def run_doctor(root: Path, *more: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shoal_cli", "doctor", "--home", str(root), *more],
        env={**clean_environment(**environ), "PYTHONPATH": source_path()},
        capture_output=True,
        text=True,
        timeout=RUN_DEADLINE_S,
        check=False,
    )


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
