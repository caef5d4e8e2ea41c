"""The supervisor, run by the real command, over small real children."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from shoal_cli.doctor.checks.nats import JetStreamSettings
from shoal_cli.doctor.probes.nats import jetstream_settings
from shoal_cli.node.control import ControlRequest, ask
from shoal_common.bus.connection import connected
from shoal_common.errors import BadMessage, NotFound, Refused
from tests.cli.conftest import Node, alive, operator_login, wait_until


def ready(node: Node, name: str, but: int = 0) -> Callable[[], bool]:
    """Whether a child is ready under another pid than `but`."""
    return lambda: any(c.name == name and c.phase == "ready" and c.pid != but for c in node.status().children)


def test_a_killed_service_is_started_again_and_only_that_one(node: Node) -> None:
    up = node.up()
    assert up.returncode == 0, up.stderr
    before = node.pids()
    os.kill(before["storage"], signal.SIGKILL)
    wait_until(ready(node, "storage", but=before["storage"]), "storage is back")
    after = node.pids()
    assert {n for n in before if before[n] != after[n]} == {"storage"}
    assert not alive(before["storage"])
    assert "killed by SIGKILL" in node.log("supervisor")
    # The supervisor copies what a child prints into the log: it may be later than the child's readiness.
    wait_until(lambda: node.log("storage").count("began") == 2, "both lives are in the log")


def test_restart_changes_the_pid_of_that_service_only(node: Node) -> None:
    node.up()
    before = node.pids()
    done = node.shoal("restart", "fetcher")
    after = node.pids()
    assert (done.returncode, done.stdout) == (0, f"fetcher is running again, pid {after['fetcher']}\n")
    assert {n for n in before if before[n] != after[n]} == {"fetcher"}
    # Asked to stop, not killed.
    wait_until(lambda: "stopping" in node.log("fetcher"), "it says so")
    assert node.shoal("restart", "placement").returncode == NotFound.exit_code


def test_a_second_up_in_the_same_home_is_refused(node: Node) -> None:
    node.up()
    before = node.pids()
    for arguments in (Node.UP, (*Node.UP, "--detach")):
        second = node.shoal(*arguments)
        assert second.returncode == 9
        assert f"pid {node.status().pid}" in second.stderr
        assert len(second.stderr.splitlines()) == 1
    assert node.pids() == before


def test_I5_down_leaves_no_process_and_is_idempotent(node: Node) -> None:
    node.behave(fetcher="parent")
    node.up()
    pids = [node.status().pid, *node.pids().values()]
    wait_until(lambda: re.search(r"stage \d+\n", node.log("fetcher")), "it has said its stage")
    pids += map(int, re.findall(r"stage (\d+)\n", node.log("fetcher")))
    assert all(map(alive, pids))
    first, second = node.shoal("down"), node.shoal("down")
    assert [pid for pid in pids if alive(pid)] == []
    assert (first.returncode, second.returncode) == (0, 0)
    assert "stopped the node" in first.stdout
    assert "no node is running" in second.stdout
    assert sorted(p.name for p in node.home.run.iterdir()) == ["lock", "nats-server.conf"]


def test_NATS_is_stopped_last(node: Node) -> None:
    node.up()
    node.shoal("down")
    ended = re.findall(r"msg=ended child=(\w+)", node.log("supervisor"))
    assert sorted(ended) == ["fetcher", "gateway", "nats", "storage"]
    assert ended[-1] == "nats"
    assert "Server Exiting" in node.log("nats")


def test_orphans_of_a_killed_service_die_before_its_restart(node: Node) -> None:
    node.behave(fetcher="parent")
    node.up()
    fetcher = node.pids()["fetcher"]
    os.kill(fetcher, signal.SIGKILL)
    wait_until(ready(node, "fetcher", but=fetcher), "fetcher is back")
    wait_until(lambda: len(re.findall(r"stage (\d+)\n", node.log("fetcher"))) == 2, "both have said their stage")
    first, second = re.findall(r"stage (\d+)\n", node.log("fetcher"))
    wait_until(lambda: not alive(int(first)), "the first stage is gone")
    assert alive(int(second))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of their parent's death")
def test_I6_children_of_a_killed_supervisor_end_and_up_works(node: Node) -> None:
    node.up()
    pids = node.pids()
    os.kill(node.status().pid, signal.SIGKILL)
    wait_until(lambda: not any(map(alive, pids.values())), "the children are gone")
    up = node.up()
    assert up.returncode == 0, up.stderr
    assert set(node.pids()) == set(pids)


def test_I6_down_ends_what_a_killed_supervisor_left(node: Node) -> None:
    node.behave(storage="deaf")
    up = node.up()
    assert up.returncode == 0, up.stderr
    pids = node.pids()
    storage = pids.pop("storage")
    os.kill(node.status().pid, signal.SIGKILL)
    if sys.platform == "linux":
        wait_until(lambda: not any(map(alive, pids.values())), "the others heard the kernel")
    assert alive(storage)
    down = node.shoal("down")
    assert down.returncode == 0, down.stderr
    assert str(storage) in down.stdout
    assert not any(map(alive, [storage, *pids.values()]))


def test_a_service_that_fails_to_start_is_named_with_its_log(node: Node) -> None:
    node.behave(storage="breaks")
    up = node.up()
    assert up.returncode == 5
    assert "storage is not ready: exit code 3" in up.stderr
    assert "cannot open the frobnicator" in up.stderr
    assert up.stderr.splitlines()[-1].startswith("shoal: node node-a is incomplete: storage is not ready")
    # The others run, and the supervisor keeps trying.
    assert {c.phase for c in node.status().children if c.name != "storage"} == {"ready"}
    status = node.shoal("status")
    assert status.returncode != 0


def test_a_service_that_is_never_ready_is_named_at_the_deadline(node: Node) -> None:
    node.behave(storage="silent")
    up = node.up("--wait", "1s")
    assert up.returncode == 5
    assert "storage is not ready: started, not ready yet" in up.stderr


def test_a_service_claimed_by_another_process_exits_with_9(node: Node) -> None:
    node.behave(storage="already_running")
    up = node.up()
    assert up.returncode == 9
    assert "another process is already this node's service" in up.stderr
    assert "pid 1 on y holds it" in up.stderr


def test_another_major_version_in_the_cluster_exits_with_10(node: Node) -> None:
    node.behave(storage="other_version")
    up = node.up()
    assert up.returncode == 10
    assert "the cluster runs an incompatible version" in up.stderr and "node y runs Shoal '2.0.0'" in up.stderr
    (storage,) = [c for c in node.status().children if c.name == "storage"]
    assert storage.last_exit_code == 10 and not storage.was_ready


def test_ctrl_c_reaches_only_the_supervisor_which_stops_in_order(node: Node) -> None:
    process = subprocess.Popen(
        node.command(*Node.UP), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=node.environ(), process_group=0
    )
    assert process.stdout is not None
    output = b""
    while b"Ctrl-C stops it" not in output:
        line = process.stdout.readline()
        assert line, "it ended"
        output += line
    node.note()
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    assert process.wait(20) == 0
    assert "got SIGINT" not in node.log("storage")
    assert not any(alive(pid) for pid in node.seen)
    assert b"http://127.0.0.1:" in output


def test_a_second_ctrl_c_kills_what_does_not_stop(node: Node) -> None:
    node.behave(storage="stubborn")
    process = subprocess.Popen(
        node.command(*Node.UP), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=node.environ(), process_group=0
    )
    assert process.stdout is not None and process.stderr is not None
    while b"Ctrl-C stops it" not in process.stdout.readline():
        assert process.poll() is None
    node.note()
    process.send_signal(signal.SIGINT)
    assert b"Ctrl-C again kills" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    # Far below the 12 s that a service has for itself.
    assert process.wait(11) == 0
    assert not any(alive(pid) for pid in node.seen)


def test_a_home_too_deep_for_a_socket_gets_its_sockets_elsewhere(
    make_node: Callable[[str], Node],
) -> None:
    deep = make_node(f"{'d' * 60}/{'e' * 40}")
    up = deep.up()
    assert up.returncode == 0, up.stderr
    control = Path(deep.home.control_path.read_text().strip())
    assert len(str(control)) < 100 < len(str(deep.home.run / "control.sock"))
    assert stat.S_IMODE(control.parent.stat().st_mode) == 0o700
    assert deep.shoal("down").returncode == 0
    assert not control.parent.exists()


def test_the_control_socket_speaks_json_lines_and_refuses_others(node: Node) -> None:
    node.up()
    status = json.loads(ask(node.home, ControlRequest(op="status"), 5))
    assert {c["name"] for c in status["children"]} == {"nats", "storage", "fetcher", "gateway"}
    with pytest.raises(BadMessage, match="status, restart, invite, revoke and stop"):
        ask(node.home, ControlRequest(op="dance"), 5)
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(5)
        s.connect(node.home.control_path.read_text().strip())
        s.sendall(b"not json\n")
        assert json.loads(s.makefile().readline())["error"]["code"] == "bad_message"


def test_up_writes_storage_flags_to_the_file_and_keeps_the_rest(node: Node) -> None:
    path = node.home.root / "node.toml"
    path.write_text(f"# mine\n{path.read_text()}\n\n[storage] # the disk\nheadroom_bytes = 7 # little\n")
    before = path.read_text()
    up = node.up("--max-storage", "200GB", "--eviction-policy", "lru")
    assert up.returncode == 0, up.stderr
    after, options, kept = path.read_text().partition("\n[node]\n")
    assert after == before + 'max_storage_bytes = 200000000000\neviction_policy = "lru"\n'
    assert options and "gateway_port = 0\n" in kept
    assert "SHOAL_MAX_STORAGE_BYTES" not in psutil.Process(node.pids()["storage"]).environ()
    node.shoal("down")
    assert node.up("--max-storage", "none").returncode == 0
    assert path.read_text().startswith(before + 'eviction_policy = "lru"\n\n[node]\n')
    node.shoal("down")
    refused = node.up("--max-storage", "5GB", SHOAL_MAX_STORAGE_BYTES="9")
    assert refused.returncode == Refused.exit_code and refused.stderr.count("\n") == 1
    assert "SHOAL_MAX_STORAGE_BYTES is set and wins" in refused.stderr
    assert path.read_text().startswith(before + 'eviction_policy = "lru"\n\n[node]\n')


async def test_NATS_is_as_asked_and_keeps_its_store_when_killed(node: Node) -> None:
    up = node.up()
    assert up.returncode == 0, up.stderr
    [ports_file] = node.home.run.glob("nats-server_*.ports")
    before = node.pids()["nats"]
    assert str(before) in ports_file.name
    [url] = node.status().nats
    # Its monitoring port would answer every web page: it listens for clients alone.
    listening = {c.laddr.port for c in psutil.Process(before).net_connections() if c.status == psutil.CONN_LISTEN}
    assert listening == {int(url.rpartition(":")[2])}
    log = node.home.log("nats").read_text()
    assert str(node.home.nats_store / "jetstream") in log
    assert "Max Storage:     1.00 GB" in log and "Max Memory:      64.00 MB" in log
    assert jetstream_settings(node.home.nats_config.read_text()) == JetStreamSettings(2**30, True, 0.0)

    async with connected([url], "test", 5, operator_login(node)) as nats:
        await nats.js.add_stream(name="kept", subjects=["kept"])
        await nats.js.publish("kept", b"acknowledged")
    os.kill(before, signal.SIGKILL)
    wait_until(ready(node, "nats", but=before), "NATS is back")
    # The same address, another process, the same store.
    assert node.status().nats == [url]
    async with connected([url], "test", 5, operator_login(node)) as nats:
        assert (await nats.js.get_last_msg("kept", "kept")).data == b"acknowledged"
    assert len(list(node.home.run.glob("nats-server_*.ports"))) == 1


def test_a_port_that_NATS_has_is_refused_with_how_to_join_it(node: Node, make_node: Callable[[str], Node]) -> None:
    node.up()
    port = node.status().nats[0].rpartition(":")[2]
    other = make_node("node-b")
    up = other.up("--nats-port", port)
    assert up.returncode == 4
    assert f"a NATS server already listens on 127.0.0.1:{port}" in up.stderr
    assert f"pid {node.pids()['nats']}" in up.stderr
    assert f"shoal join 127.0.0.1:{port}" in up.stderr


@pytest.mark.parametrize("flag", ["--nats-port", "--port"])
def test_a_port_that_another_program_has_is_refused_naming_it(node: Node, flag: str) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        up = node.up(flag, str(s.getsockname()[1]))
    assert up.returncode == 4
    assert f"pid {os.getpid()}" in up.stderr
    assert flag in up.stderr


def test_another_name_for_a_node_that_has_one_is_refused(node: Node) -> None:
    up = node.up("--node", "node-z")
    assert up.returncode == 2
    assert "is named node-a and keeps that name" in up.stderr
