"""A node whose disk is full, missing or read-only: it starts, or says which path, why, and what to do."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shoal_common.bus.connection import connected
from shoal_common.errors import BadInput, DiskFull
from shoal_common.store.ballast import BallastFile
from tests.cli.conftest import Node, operator_login, wait_until
from tests.harness.process import source_path
from tests.harness.tiny_filesystem import FILLER, fill, fill_up, free_bytes, small_disk

MIB = 1 << 20
DISK_BYTES = 96 * MIB


def with_ballast(node: Node, size_bytes: int) -> None:
    """Set the size of the ballast in node.toml."""
    with (node.home.root / "node.toml").open("a") as f:
        f.write(f"\n[storage]\nballast_bytes = {size_bytes}\n")


@contextmanager
def disk_of_nats(node: Node) -> Iterator[Path]:
    """A small disk for NATS's store alone."""
    with small_disk(node.home.nats_store, DISK_BYTES) as disk:
        yield disk
        down = node.shoal("down")  # before the disk goes
        assert down.returncode == 0, down.stderr


async def stores(node: Node) -> bool:
    """Whether NATS acknowledges a write."""
    [url] = node.status().nats
    async with connected([url], "test", 10.0, operator_login(node)) as nats:
        js = nats.client.jetstream(timeout=1.0)
        try:
            await js.publish("$KV.spec.member.a-probe", b"{}")
        except Exception:  # noqa: BLE001  # any refusal
            return False
        return True


def problem_of_nats(node: Node) -> str:
    """What the supervisor says of NATS."""
    return next(c.problem for c in node.status().children if c.name == "nats")


async def test_NATS_stores_again_when_its_full_disk_has_room(node: Node) -> None:
    with_ballast(node, 0)
    with disk_of_nats(node) as disk:
        up = node.up()
        assert up.returncode == 0, up.stderr
        before = node.pids()
        assert await stores(node)
        filler = fill(disk)
        while await stores(node):
            fill_up(filler)
        wait_until(lambda: "is full" in problem_of_nats(node), "the supervisor names the full disk")
        assert str(node.home.nats_store) in problem_of_nats(node)
        doctor = node.shoal("doctor")
        assert f"the disk of {node.home.nats_store} is full" in doctor.stdout
        filler.unlink()
        wait_until(lambda: node.pids()["nats"] not in (0, before["nats"]), "NATS is restarted")
        wait_until(lambda: not problem_of_nats(node), "all is well again")
        assert await stores(node)
        assert "NATS refuses to store, restarting it" in node.log("supervisor")
        assert {n for n, pid in node.pids().items() if before[n] != pid} == {"nats"}


async def test_the_ballast_under_NATS_is_given_up_first(node: Node) -> None:
    with_ballast(node, 8 * MIB)
    with disk_of_nats(node) as disk:
        node.up()
        wait_until(node.home.nats_ballast.exists, "the ballast is made")
        fill(disk)
        wait_until(lambda: not node.home.nats_ballast.exists(), "the ballast is given up")
        wait_until(lambda: free_bytes(disk) and not problem_of_nats(node), "NATS has room")
        assert await stores(node)


def test_no_second_ballast_on_the_disk_of_the_store(node: Node) -> None:
    with_ballast(node, 8 * MIB)
    node.up()
    wait_until(lambda: "node started" in node.log("supervisor"), "it has started")
    assert not node.home.nats_ballast.exists()


@contextmanager
def full_home(node: Node, ballast_bytes: int) -> Iterator[Path]:
    """The home of a node that has run, on a disk that is full to the last byte beside a ballast."""
    parts = node.home.root.parent / "parts"
    shutil.move(node.home.root, parts)
    with small_disk(node.home.root, DISK_BYTES) as disk:
        shutil.copytree(parts, disk, dirs_exist_ok=True)
        assert node.up().returncode == 0
        node.shoal("down")
        if ballast_bytes:
            (disk / "store").mkdir(exist_ok=True)
            BallastFile(disk / "store" / "ballast", ballast_bytes).make()
        fill(disk)
        yield disk
        down = node.shoal("down")
        assert down.returncode == 0, down.stderr
        (disk / FILLER).unlink()


@pytest.mark.parametrize("detached", [True, False])
def test_a_node_starts_on_a_full_disk_by_its_ballast(node: Node, detached: bool) -> None:
    with full_home(node, 16 * MIB) as home:
        if detached:
            up = node.up()
            assert up.returncode == 0, up.stderr
            assert "is full, 16.8 MB of ballast given up: free space with `shoal rm` or `shoal gc`" in up.stderr
        else:
            process = subprocess.Popen(node.command(*Node.UP), env=node.environ(), stderr=subprocess.PIPE, text=True)
            wait_until(lambda: node.log("supervisor").count("node started") == 2, "it has started")
            node.note()
            node.shoal("down")
            assert "of ballast given up" in process.communicate(timeout=30)[1]
        assert free_bytes(home) > 0


@pytest.mark.parametrize("detached", [["--detach"], []])
def test_a_start_on_a_full_disk_says_which_and_what_to_do(node: Node, detached: list[str]) -> None:
    with full_home(node, 0):
        up = node.shoal(*Node.UP, *detached)
        assert up.returncode == DiskFull.exit_code
        assert up.stderr.splitlines()[-1].startswith(f"shoal: the disk of {node.home.root} is full")
        assert "free some space" in up.stderr and "OSError" not in up.stderr


@pytest.mark.parametrize("detached", [["--detach"], []])
def test_a_home_that_is_a_link_to_a_missing_disk_is_named(tmp_path: Path, detached: list[str]) -> None:
    (tmp_path / "home").symlink_to(tmp_path / "gone")
    for home in (tmp_path / "home", tmp_path / "home" / "below"):
        up = shoal_up(home, detached)
        assert up.returncode == BadInput.exit_code
        [line] = up.stderr.splitlines()
        assert f"{tmp_path / 'home'} is a link to {tmp_path / 'gone'}, which is not there: mount its disk" in line


@pytest.mark.parametrize("name", ["nats", "log", "run", "identity"])
def test_a_part_that_is_a_link_to_a_missing_disk_is_named(node: Node, name: str) -> None:
    (node.home.root / name).symlink_to(node.home.root.parent / "gone")
    up = node.up()
    assert up.returncode == BadInput.exit_code
    assert f"{node.home.root / name} is a broken link to" in up.stderr.splitlines()[-1]
    (node.home.root / name).unlink()


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "read-only", MIB) as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        yield disk


@pytest.mark.parametrize("detached", [["--detach"], []])
def test_a_home_below_a_read_only_directory_is_named(read_only: Path, detached: list[str]) -> None:
    up = shoal_up(read_only / "home", detached)
    assert up.returncode == BadInput.exit_code
    [line] = up.stderr.splitlines()
    assert line.startswith(f"shoal: {read_only / 'home'} cannot be written (Read-only file system)")
    assert "--home" in line


def shoal_up(home: Path, detached: list[str]) -> subprocess.CompletedProcess[str]:
    """Try to start a node in a home."""
    command = [sys.executable, "-m", "shoal_cli", *Node.UP, *detached, "--home", str(home)]
    return subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": source_path(), "PATH": "/usr/bin:/bin"},
    )
