"""A node's home: its files are private, and what is damaged, lost or copied is named before anything starts."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from shoal_cli.node.down import lock_holder
from shoal_cli.node_home import Home, RunLock
from shoal_common.errors import AlreadyRunning, BadInput, Refused
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
        *("node.toml", "run/lock", "run/supervisor.pid", "run/children.json", "run/control.path"),
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


def test_a_list_of_processes_that_is_no_text_names_none(node: Node) -> None:
    node.home.create()
    node.home.children.write_bytes(b'["\x80"]')
    assert node.up().returncode == 0


def test_a_node_that_lost_its_id_does_not_start(node: Node) -> None:
    assert node.up().returncode == 0
    node.shoal("down")
    (node.home.root / "node.toml").write_text("")
    lost = node.up()
    assert lost.returncode == Refused.exit_code and "the home of node node-a" in lost.stderr


@pytest.mark.parametrize("killed", [False, True])
def test_a_copy_of_a_running_home_is_refused_and_ends_nothing(
    node: Node, make_node: Callable[[str], Node], killed: bool
) -> None:
    node.behave(storage="deaf")
    assert node.up().returncode == 0
    before = node.pids()
    control = Path(node.home.control_path.read_text().strip())
    copy = make_node("copy")
    shutil.rmtree(copy.home.root)
    shutil.copytree(node.home.root, copy.home.root, ignore=shutil.ignore_patterns("*.sock", "*.notify"))
    for arguments in (Node.UP, (*Node.UP, "--detach")):
        refused = copy.shoal(*arguments)
        assert refused.returncode == AlreadyRunning.exit_code
        assert f"{copy.home.root} is a copy of {node.home.root}, whose node node-a is running" in refused.stderr
    assert copy.shoal("restart", "storage").returncode != 0
    assert copy.shoal("down").returncode == 0
    assert node.pids() == before and control.exists()
    # As another node it may run beside the original, or beside what a killed original left.
    if killed:
        os.kill(node.status().pid, signal.SIGKILL)
    for file in (node.home.children, node.home.control_path):
        shutil.copy(file, copy.home.run / file.name)
    settings = copy.home.root / "node.toml"
    settings.write_text(settings.read_text().replace("node-a", "node-b"))
    assert "the keys of another node than node-b" in copy.up().stderr
    for keys in ("identity", "operator"):
        shutil.rmtree(copy.home.root / keys)
    up = copy.up()
    assert up.returncode == 0, up.stderr
    assert psutil.pid_exists(before["storage"])
    if not killed:
        assert node.pids() == before


def test_down_knows_a_supervisor_by_the_homes_lock_alone(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    lock = RunLock(home)
    lock.acquire()
    holder = lock_holder(home)
    assert holder is not None and holder.pid == os.getpid()
    home.pid.write_text(f"{os.getppid()}\n")  # as in a copy: of another process, which down would signal
    assert lock_holder(home) is None
    lock.release()
    home.pid.write_text(f"{os.getpid()}\n")
    assert lock_holder(home) is None


def test_code_where_up_is_typed_does_not_run_inside_shoal(node: Node, tmp_path: Path) -> None:
    trap, ran = tmp_path / "trap", tmp_path / "ran"
    trap.mkdir()
    for module in ("queue", "json", "msgspec", "shoal_storage", "sitecustomize"):
        (trap / f"{module}.py").write_text(f"open({str(ran)!r}, 'a').write({module!r})\n")
    (node.home.root / "node.toml").write_text('id = "node-a"\n')
    arguments = [*node.command(*Node.UP, "--no-fetcher", "--no-gateway", "--detach")[3:]]
    # As the `shoal` script, which does not look where it is started; its children would, with this PYTHONPATH.
    script = "import os, sys; os.environ['PYTHONPATH'] = f\":{os.environ['PYTHONPATH']}\"; "
    script += "from shoal_cli.cli import run; sys.exit(run(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, *arguments],
        env=node.environ(SHOAL_BALLAST_BYTES="0"),
        cwd=trap,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not ran.exists(), ran.read_text()
    for pid in (node.status().pid, *node.pids().values()):
        assert psutil.Process(pid).cwd() == str(node.home.run)


def _up_limited(node: Node, ulimit: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", "-c", f'{ulimit} && exec "$@"', "sh", *node.command(*Node.UP, "--detach")]
    return subprocess.run(command, env=node.environ(), capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the limits of another process")
def test_a_low_soft_limit_of_open_files_is_raised(node: Node) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert _up_limited(node, "ulimit -Sn 256").returncode == 0
    for pid in (node.status().pid, *node.pids().values()):
        assert psutil.Process(pid).rlimit(psutil.RLIMIT_NOFILE)[0] >= min(65_536, hard)


def test_a_low_hard_limit_of_files_is_named_and_stops_nothing(node: Node) -> None:
    assert _up_limited(node, "ulimit -n 256").returncode == 0
    assert {c.phase for c in node.status().children} == {"ready"}
    assert "may have 256 files and connections open, fewer than the 1024" in node.log("supervisor")
    assert "LimitNOFILE=" in node.log("supervisor")
