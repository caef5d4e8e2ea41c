"""A node's home: its files are private, and what is damaged, lost or copied is named before anything starts."""

from __future__ import annotations

import pytest

from shoal_common.errors import BadInput, Refused
from tests.cli.conftest import Node
from tests.harness.modes import make_wrong, open_to_others, usual_umask


def test_no_other_user_can_read_a_nodes_home(node: Node) -> None:
    with usual_umask():
        node.home.logs.mkdir()
        node.home.log("storage").write_text("of an older version\n")
        node.home.root.chmod(0o755)
        node.home.log("storage").chmod(0o644)
        (node.home.root / "node.toml").chmod(0o644)
        node.behave(storage="writes")
        assert node.up("--bind", "0.0.0.0").returncode == 0
    assert (node.home.root / "written").exists() and any(node.home.nats_store.rglob("*"))
    assert open_to_others(node.home.root) == []


@pytest.mark.parametrize(
    "name",
    [
        *("node.toml", "secret", "run/lock", "run/supervisor.pid", "run/children.json", "run/control.path"),
        *("run/gateway.url", "run/nats-server.conf", "log/supervisor.log", "log/storage.log"),
    ],
)
@pytest.mark.parametrize("detach", [True, False])
def test_up_names_a_directory_in_a_files_place(node: Node, name: str, detach: bool) -> None:
    make_wrong(node.home.root / "run", "directory")
    node.home.logs.mkdir()
    make_wrong(node.home.root / name, "directory")
    done = node.shoal(*Node.UP, *(["--detach"] if detach else []))
    assert (done.returncode, len(done.stderr.splitlines())) == (BadInput.exit_code, 1), done.stderr
    assert f"{node.home.root / name} cannot be read: it is a directory where a file belongs" in done.stderr
    make_wrong(node.home.root / name, "")
    node.behave()


@pytest.mark.parametrize("name", ["log", "run", "nats", "store"])
def test_up_names_a_file_in_a_directorys_place(node: Node, name: str) -> None:
    (node.home.root / name).write_text("x")
    for arguments in (Node.UP, (*Node.UP, "--detach")):
        done = node.shoal(*arguments)
        assert (done.returncode, len(done.stderr.splitlines())) == (BadInput.exit_code, 1), done.stderr
        assert f"{node.home.root / name} is a file where a directory belongs" in done.stderr
    (node.home.root / name).unlink()


def test_garbage_in_run_neither_stops_up_nor_ends_anything(node: Node) -> None:
    node.home.create()
    for file in (node.home.pid, node.home.children, node.home.control_path, node.home.gateway_url):
        file.write_text("\0garbage")
    for arguments in (["status"], ["down"], ["restart", "storage"]):
        done = node.shoal(*arguments)
        assert len(done.stderr.splitlines()) <= 1 and "shows the traceback" not in done.stderr, done.stderr
    for file in (node.home.pid, node.home.children, node.home.control_path, node.home.gateway_url):
        file.write_text("\0garbage")
    assert node.up().returncode == 0


def test_a_node_that_lost_its_id_or_secret_does_not_start(node: Node) -> None:
    assert node.up().returncode == 0
    node.shoal("down")
    (node.home.root / "node.toml").write_text("")
    lost = node.up()
    assert lost.returncode == Refused.exit_code and "the home of node node-a" in lost.stderr
    node.behave()
    node.home.secret.write_text("")
    emptied = node.up("--bind", "0.0.0.0")
    assert emptied.returncode == BadInput.exit_code and f"{node.home.secret} is empty" in emptied.stderr
