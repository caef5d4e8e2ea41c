"""`shoal doctor` against real servers, processes and files: problems that are really there."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from nats.js import api

from shoal_cli.node_home import Home
from shoal_common import VERSION
from shoal_common.bus.keys import MEMBERS_KEY, instance_key, liveness_key, stage_key
from shoal_common.bus.streams import stream_configs
from shoal_common.errors import StageLost
from shoal_common.host.process_identity import this_process
from shoal_common.messages.instances import InstanceState, StageState
from shoal_common.messages.liveness import LivenessRecord, NodeAddress, NodeFacts
from shoal_common.messages.placement import MembersState
from tests.cli.doctor_fixtures import (
    cluster,
    findings_about,
    listening,
    liveness_elsewhere,
    only_finding,
    probe,
    put_liveness,
)
from tests.harness import nats as nats_harness
from tests.harness.nats import Joined, NatsServer


def test_an_unreachable_nats_is_one_problem_and_checks_go_on(home: Home, closed_port: int) -> None:
    report = probe(home, f"nats://127.0.0.1:{closed_port}")
    found = only_finding(report, "nats")
    assert found.level == "problem" and "nothing listens there" in found.what and str(closed_port) in found.what
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


def test_a_nats_that_refuses_our_credentials_is_not_down(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(monkeypatch, tmp_path, 'authorization {{ token: "the-right-token" }}\n') as server:
        found = only_finding(probe(home, server), "nats")
        assert found.level == "problem" and "refuses our credentials" in found.what, found
        url = server.url.replace("://", "://the-right-token@")
        assert only_finding(probe(home, url), "nats").level == "ok"


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


def test_a_nats_of_ones_own_with_periodic_sync_is_a_warning(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        nats_harness, "_SETTINGS", nats_harness._SETTINGS.replace("sync_interval: always", 'sync_interval: "2m"')
    )
    home.run.mkdir()
    with served(monkeypatch, tmp_path, "") as server:
        cluster(server, _nothing)
        for file in (*server.directory.glob("*.ports"), server.directory / "nats-server.conf"):
            (home.run / file.name).write_bytes(file.read_bytes())
        report = probe(home, server)
    assert only_finding(report, "nats").level == "warning" and "every 120 s" in only_finding(report, "nats").what
    assert "1.1 GB" in only_finding(report, "nats store").what


# What the nodes say of themselves


def test_a_node_that_is_gone_is_named_with_its_instances(home: Home, own_nats: NatsServer) -> None:
    async def remove_b(here: Joined) -> None:
        await here.buckets.state.put(MEMBERS_KEY, MembersState(lost_since_s={"a": 0.0, "b": 86400.0}))
        error = StageLost("node b is down since 1970-01-02T00:00:00+00:00").body()
        lost = InstanceState(id="i1", repo="o/m", commit="c" * 40, phase="degraded", nodes=["a", "b"], error=error)
        await here.buckets.state.put(instance_key("i1"), lost)

    put_liveness(own_nats, ("a", "storage", liveness_elsewhere()))
    assert only_finding(probe(home, own_nats), "nodes").what == "up: a"
    cluster(own_nats, remove_b)
    found = {f.about: f for f in findings_about(probe(home, own_nats), "nodes")}
    assert {f.level for f in found.values()} == {"problem"} and set(found) == {"node b", "i1"}
    assert "node b is down since 1970-01-02" in found["node b"].what and "i1 cannot answer" in found["i1"].what


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


def test_an_unreachable_fileserver_is_reported(home: Home, own_nats: NatsServer, closed_port: int) -> None:
    here = LivenessRecord(
        holder=this_process(), version=VERSION, facts=NodeFacts(addresses=[f"127.0.0.1:{closed_port}"])
    )
    there = liveness_elsewhere(facts=NodeFacts(addresses=[]))
    put_liveness(own_nats, ("b", "fileserver", here), ("c", "fileserver", there))
    found = {f.about: f for f in findings_about(probe(home, own_nats), "fileservers")}
    assert "nothing listens there" in found["node b"].what and str(closed_port) in found["node b"].what
    assert "publishes no address" in found["node c"].what


def test_services_elsewhere_with_this_node_id_are_not_ours(home: Home, own_nats: NatsServer) -> None:
    put_liveness(own_nats, ("a", "storage", liveness_elsewhere()))
    assert "is not running" in only_finding(probe(home, own_nats), "services").what


def test_a_closed_port_of_another_node_is_reported(home: Home, own_nats: NatsServer, closed_port: int) -> None:
    gateway = LivenessRecord(
        holder=this_process(), version=VERSION, facts=NodeFacts(addresses=[f"127.0.0.1:{closed_port}"])
    )
    link = NodeAddress(address=f"127.0.0.1:{closed_port}")
    stage = StageState(instance="i1", rank=0, node="b", epoch=1, phase="linking", links=[link])

    async def write(here: Joined) -> None:
        await here.buckets.live.put(liveness_key("b", "gateway"), gateway)
        await here.buckets.state.put(stage_key("i1", 0), stage)

    cluster(own_nats, write)
    found = {f.level: f.what for f in findings_about(probe(home, own_nats), "node ports")}
    assert f"TCP {closed_port} of node b (gateway) is closed" in found["warning"]
    assert f"TCP {closed_port} of node b (stage) is closed" in found["problem"]
