"""Inviting, joining, leaving, and being revoked, by the real commands."""

from __future__ import annotations

import re
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from shoal_cli.membership.operator_files import OperatorFiles
from shoal_common.bus.connection import connected
from shoal_common.bus.keys import member_key
from shoal_common.bus.kv_bucket import Buckets
from shoal_common.config import read_settings_file
from shoal_common.errors import Denied, Refused
from shoal_common.identity.node_identity import NodeIdentity
from shoal_common.identity.tls import unverified_context
from tests.cli.conftest import Node, operator_login, wait_until


def invitation(node: Node) -> tuple[str, str]:
    """Return the address and the code that `shoal invite` prints."""
    done = node.shoal("invite")
    assert done.returncode == 0, done.stderr
    return parsed(done.stdout)


def parsed(printed: str) -> tuple[str, str]:
    address = re.search(r"shoal join (\S+)", printed)
    code = re.search(r"(?:[A-Z2-7]{4}-){12}[A-Z2-7]{4}", printed)
    assert address and code, printed
    return address.group(1), code.group()


def join(node: Node, address: str, code: str) -> str:
    """Join; return the error, or ""."""
    file = node.home.root / "code"
    file.write_text(code)
    done = node.shoal("join", address, "--code-file", str(file))
    assert done.returncode in (0, Denied.exit_code, Refused.exit_code), (done.returncode, done.stderr)
    assert len(done.stderr.splitlines()) == (1 if done.returncode else 0), done.stderr
    return done.stderr


def is_member(node: Node) -> bool:
    return NodeIdentity(node.home.root, node.home.root.name).is_member


def test_I12_I14_a_code_lets_one_machine_in_and_it_stays(node: Node, make_node: Callable[[str], Node]) -> None:
    assert node.up().returncode == 0
    address, code = invitation(node)
    b, c = make_node("node-b"), make_node("node-c")
    assert join(b, address, code.lower().replace("-", " ")) == ""
    members = OperatorFiles(node.home.root).members()
    assert sorted(members) == ["node-a", "node-b"]
    assert members["node-b"].nkeys == NodeIdentity(b.home.root, "node-b").public_nkeys()
    # Plain `shoal up` is a node of that cluster, now and after a restart.
    for _ in range(2):
        up = b.up()
        assert up.returncode == 0, up.stderr
        assert "nats" not in b.pids() and b.status().nats == [f"tls://{address}"]
        assert b.shoal("down").returncode == 0
    used = join(c, address, code)
    assert "has let in node node-b already" in used and not is_member(c)
    assert "belongs to a cluster already" in join(b, *invitation(node))
    for text in (n.log(name) for n in (node, b) for name in ("supervisor", "nats", "storage")):
        assert code not in text and code.replace("-", "") not in text


def test_I12_a_wrong_code_is_one_line_and_nothing_is_left(node: Node, make_node: Callable[[str], Node]) -> None:
    assert node.up().returncode == 0
    address, code = invitation(node)
    b, other = make_node("node-b"), make_node("node-x")
    first, last = code[:4], code[4:]
    unknown = ("AAAA" if first != "AAAA" else "BBBB") + last
    assert "does not know this invitation" in join(b, address, unknown)
    assert other.up().returncode == 0
    foreign_address, foreign_code = invitation(other)
    assert "is not the one that this invitation is for" in join(b, address, foreign_code)
    assert "is not the one that this invitation is for" in join(b, foreign_address, code)
    assert not is_member(b) and "cluster" not in read_settings_file(b.home.root)
    assert b.shoal("join", address, "--code-file", "/dev/null").returncode == 2
    assert join(b, address, code) == ""


def test_a_code_is_printed_once_nats_has_read_it(node: Node, make_node: Callable[[str], Node]) -> None:
    assert node.up().returncode == 0
    nats = psutil.Process(node.pids()["nats"])
    nats.suspend()
    try:
        command = subprocess.Popen(node.command("invite"), env=node.environ(), stdout=subprocess.PIPE, text=True)
        wait_until(lambda: OperatorFiles(node.home.root).invitations(), "it is made")
        with pytest.raises(subprocess.TimeoutExpired):
            command.wait(1)
    finally:
        nats.resume()
    printed, _ = command.communicate(timeout=30)
    assert command.returncode == 0
    assert join(make_node("node-b"), *parsed(printed)) == ""


def test_a_name_that_is_taken_is_refused_until_it_is_revoked(node: Node, make_node: Callable[[str], Node]) -> None:
    assert node.up().returncode == 0
    b = make_node("node-b")
    assert join(b, *invitation(node)) == ""
    again = make_node("elsewhere/node-b")
    assert "shoal node revoke node-b" in join(again, *invitation(node))
    assert node.shoal("node", "revoke", "node-b").returncode == 0
    assert join(again, *invitation(node)) == ""


async def test_I12_a_revoked_node_is_turned_away_in_one_line(node: Node, make_node: Callable[[str], Node]) -> None:
    assert node.up().returncode == 0
    b = make_node("node-b")
    assert join(b, *invitation(node)) == ""
    assert b.up().returncode == 0
    async with connected(node.status().nats, "test", 30, operator_login(node)) as nats:
        spec = Buckets(nats.js).spec
        assert await spec.get(member_key("node-b"))
        revoked = node.shoal("node", "revoke", "node-b")
        assert revoked.returncode == 0, revoked.stderr
        assert await spec.get(member_key("node-b")) is None
        assert await spec.get(member_key("node-a"))
    b.shoal("down")
    up = b.up()
    assert up.returncode == Denied.exit_code and "refuses our credentials" in up.stderr.splitlines()[-1]
    assert b.home.read_pid() == 0
    for wrong, text in (("node-b", "does not belong to this cluster"), ("node-a", "the cluster ends with it")):
        assert text in node.shoal("node", "revoke", wrong).stderr
    assert "invite and revoke on the node that started it" in _refused_elsewhere(node, make_node)


def _refused_elsewhere(node: Node, make_node: Callable[[str], Node]) -> str:
    c = make_node("node-c")
    assert join(c, *invitation(node)) == ""
    assert c.up().returncode == 0
    return c.shoal("invite").stderr


def test_a_node_that_leaves_is_one_of_its_own_again(node: Node, make_node: Callable[[str], Node]) -> None:
    assert node.up().returncode == 0
    b = make_node("node-b")
    assert join(b, *invitation(node)) == ""
    assert b.up().returncode == 0
    assert "already running" in b.shoal("leave").stderr
    b.shoal("down")
    left = b.shoal("leave")
    assert left.returncode == 0 and left.stdout == "node node-b has left its cluster\n"
    wait_until(lambda: sorted(OperatorFiles(node.home.root).members()) == ["node-a"], "the operator knows")
    assert not is_member(b) and read_settings_file(b.home.root).get("cluster", {}) == {}
    assert b.shoal("leave").stdout == "node node-b belongs to no cluster\n"
    assert b.up().returncode == 0 and "nats" in b.pids()
    assert "nothing to leave" in b.shoal("leave").stderr


def test_a_node_can_leave_a_cluster_that_is_gone(node: Node, make_node: Callable[[str], Node]) -> None:
    assert node.up().returncode == 0
    b = make_node("node-b")
    assert join(b, *invitation(node)) == ""
    node.shoal("down")
    left = b.shoal("leave")
    assert left.returncode == 0 and "shoal node revoke node-b" in left.stdout
    assert not is_member(b)


@pytest.mark.parametrize("address", ["", "user@host", "http://[", "host:port"])
def test_what_is_no_address_is_refused(node: Node, tmp_path: Path, address: str) -> None:
    file = tmp_path / "code"
    file.write_text("A" * 52)
    done = node.shoal("join", address, "--code-file", str(file))
    assert done.returncode == 2 and "is not an address" in done.stderr


def test_I12_without_keys_NATS_answers_nothing(node: Node) -> None:
    assert node.up("--bind", "0.0.0.0").returncode == 0
    port = int(node.status().nats[0].rpartition(":")[2])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=30) as plain,
        unverified_context().wrap_socket(plain) as s,
        s.makefile("rb") as reader,
    ):
        assert b'"auth_required":true' in reader.readline()
        s.sendall(b'CONNECT {"verbose":false}\r\nPING\r\n')
        assert b"Authorization Violation" in reader.readline()
    with socket.create_connection(("127.0.0.1", port), timeout=30) as plain:
        plain.sendall(b'CONNECT {"verbose":false}\r\nPING\r\n')
        assert plain.recv(1 << 16)[:1] != b"P"


def test_NATS_alone_runs_for_services_that_systemd_runs(
    node: Node, tmp_path: Path, make_node: Callable[[str], Node]
) -> None:
    up = node.shoal("up", "--detach", "--nats-port", "0", "--only-nats")
    assert up.returncode == 0, up.stderr
    assert list(node.pids()) == ["nats"]
    file = tmp_path / "code"
    invited = node.shoal("invite", "--file", str(file))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and file.read_text().strip() not in invited.stdout
    b = make_node("node-b")
    address = node.status().nats[0].removeprefix("tls://")
    assert b.shoal("join", address, "--code-file", str(file)).returncode == 0
    assert "cluster has its NATS elsewhere" in b.shoal("up", "--only-nats").stderr
