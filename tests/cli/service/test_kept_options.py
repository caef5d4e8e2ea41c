"""A node keeps what `shoal up` was told, and its ports, by the real command over stand-ins."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Callable

from shoal_cli.doctor.run import run_checks
from shoal_cli.node.control import SupervisorStatus
from shoal_common.config import read_settings_file
from tests.cli.conftest import Node, alive, wait_until
from tests.cli.doctor_fixtures import clean_environment, only_finding
from tests.cli.service.test_membership import invitation, join


def what_it_is(status: SupervisorStatus) -> tuple[object, ...]:
    return status.bind, status.ports, status.nats, status.gateway, status.hub, [c.name for c in status.children]


def plain_up(node: Node) -> None:
    up = node.shoal("up", "--detach")
    assert up.returncode == 0, up.stderr


def test_plain_up_is_the_same_node_after_down_and_kill_9(node: Node) -> None:
    up = node.up("--bind", "0.0.0.0", "--hub", "http://hub.example")
    assert up.returncode == 0, up.stderr
    first = what_it_is(node.status())
    assert first[0] == "0.0.0.0" and first[4] == "http://hub.example"
    ports = [port for found in node.status().ports.values() for port in found]
    assert re.search(rf"firewall  let the other machines reach TCP {min(ports)}, {max(ports)} here", up.stdout)
    assert node.shoal("down").returncode == 0
    plain_up(node)
    assert what_it_is(node.status()) == first
    pids = [*node.pids().values(), node.status().pid]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(map(alive, pids)), "all are dead")
    plain_up(node)
    assert what_it_is(node.status()) == first


def test_an_option_that_is_said_again_changes_what_is_kept(node: Node) -> None:
    assert node.up("--bind", "0.0.0.0").returncode == 0
    assert node.shoal("down").returncode == 0
    up = node.shoal("up", "--detach", "--bind", "default", "--no-placement", "--no-inference", "--no-fileserver")
    assert up.returncode == 0, up.stderr
    assert node.status().bind == "127.0.0.1" and "firewall" not in up.stdout
    kept = read_settings_file(node.home.root)["node"]
    assert kept == {"nats_port": 0, "gateway_port": 0, "without": ["fileserver", "placement", "inference"]}
    assert node.status().kept == sorted(kept)
    refused = node.shoal("up", "--all-services", "--no-gateway")
    assert refused.returncode == 2 and "contradict" in refused.stderr


def test_a_chosen_port_that_is_taken_is_chosen_anew_with_a_line(node: Node) -> None:
    assert node.up().returncode == 0
    [before] = node.status().ports["gateway"]
    assert node.shoal("down").returncode == 0
    with socket.create_server(("127.0.0.1", before)):
        plain_up(node)
        [after] = node.status().ports["gateway"]
        assert after != before
        assert f"port {before}, the gateway_port so far, is taken" in node.log("supervisor")
    assert read_settings_file(node.home.root)["chosen"]["gateway_port"] == after


def test_a_set_port_of_a_service_that_is_taken_is_refused(node: Node) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = str(holder.getsockname()[1])
        up = node.shoal("up", "--detach", "--nats-port", "0", "--port", "0", SHOAL_FILESERVER_PORT=port)
    assert up.returncode == 4
    assert f"port {port}" in up.stderr and f"pid {os.getpid()}" in up.stderr


def test_an_address_of_another_machine_is_said_to_be_that(node: Node) -> None:
    for arguments, source in ((("--bind", "203.0.113.7"), "--bind"), ((), "SHOAL_BIND names it")):
        environ = {} if arguments else {"SHOAL_BIND": "203.0.113.7"}
        up = node.up(*arguments, **environ)
        assert up.returncode == 2
        assert "this machine does not have the address 203.0.113.7; it has " in up.stderr and "127.0.0.1" in up.stderr
        assert source in up.stderr and "pid" not in up.stderr and "program" not in up.stderr
    assert "node" not in read_settings_file(node.home.root), "what was refused is not kept"


def test_doctor_says_that_the_first_node_keeps_a_member_out(node: Node, make_node: Callable[[str], Node]) -> None:
    assert node.up().returncode == 0
    b, other = make_node("node-b"), make_node("node-x")
    assert join(b, *invitation(node)) == ""
    found = [f for f in run_checks(node.home, clean_environment()).findings if f.check == "nodes"]
    assert [f.level for f in found] == ["warning", "problem"]
    assert "node node-b is down" in found[0].what
    assert "listens on 127.0.0.1 only" in found[1].what
    assert other.up().returncode == 0
    elsewhere = clean_environment(SHOAL_NATS=other.status().nats[0])
    assert "is the server of another cluster" in only_finding(run_checks(b.home, elsewhere), "nats").what
