"""Nodes made of stand-ins, run by the real command; and a real HTTP server to be a gateway."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from shoal_cli.membership.operator_files import OperatorFiles
from shoal_cli.node.control import SupervisorStatus
from shoal_cli.node.down import supervisor_status
from shoal_cli.node_home import Home
from shoal_common.bus.connection import NatsLogin
from shoal_common.errors import ShoalError
from shoal_common.identity.tls import client_context
from tests.cli.fake_gateway import Cluster
from tests.harness.process import source_path

STANDIN = Path(__file__).parent / "fake_service.py"
DEADLINE_S = 45.0


def wait_until(wanted: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> object:
    """Look until it is true, and say what was waited for when it never is."""
    give_up_s = time.monotonic() + deadline_s
    while not (found := wanted()):
        assert time.monotonic() < give_up_s, f"never: {what}"
        time.sleep(0.02)
    return found


class Node:
    """A node of stand-ins in its own home, driven through `python -m shoal_cli`."""

    def __init__(self, root: Path) -> None:
        self.home = Home(root)
        self.seen: set[int] = set()
        root.mkdir(parents=True)
        self.behave()

    def behave(self, **behaviours: str) -> None:
        """Write node.toml: `storage` and `gateway` run, each as it is told."""
        all_behaviours = {"storage": "storage", "fetcher": "fetcher", "gateway": "gateway"} | behaviours
        lines = [f'id = "{self.home.root.name}"', "[commands]"]
        lines += [
            f"{n} = {json.dumps([sys.executable, '-S', '-I', str(STANDIN), b])}" for n, b in all_behaviours.items()
        ]
        lines += ["[gateway]", 'tls = "off"']  # the stand-in speaks none
        (self.home.root / "node.toml").write_text("\n".join(lines))

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "shoal_cli", *arguments, "--home", str(self.home.root)]

    def environ(self, **more: str) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SHOAL_", "HF_"))}
        return {**clean, "PYTHONPATH": source_path(), **more}

    def shoal(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*arguments),
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
            env=self.environ(**environ),
        )
        self.note()
        return done

    UP = (
        "up",
        "--nats-port",
        "0",
        "--port",
        "0",
        "--no-fileserver",
        "--no-placement",
        "--no-inference",
        "--wait",
        "10s",
    )

    def up(self, *more: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return self.shoal(*self.UP, "--detach", *more, **environ)

    def status(self) -> SupervisorStatus:
        found = supervisor_status(self.home)
        assert found is not None, "no supervisor answers"
        return found

    def pids(self) -> dict[str, int]:
        return {c.name: c.pid for c in self.status().children}

    def note(self) -> None:
        """Remember what runs, so that the end of the test can see that none of it does."""
        found = None
        with suppress(OSError, ShoalError):  # a test has put something else in the place of its files
            found = supervisor_status(self.home)
        if found is not None:
            self.seen |= {found.pid, *(c.pid for c in found.children if c.pid)}

    def log(self, name: str) -> str:
        path = self.home.log(name)
        return path.read_text() if path.exists() else ""


def operator_login(node: Node) -> NatsLogin:
    """Return the login of the operator of the cluster that a node has started."""
    files = OperatorFiles(node.home.root)
    return NatsLogin(files.nkey, "_INBOX.operator", client_context(files.authority))


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def make_node(tmp_path: Path) -> Iterator[Callable[[str], Node]]:
    made: list[Node] = []

    def make(name: str) -> Node:
        made.append(Node(tmp_path / name))
        return made[-1]

    yield make
    for node in reversed(made):
        node.note()
        down = node.shoal("down")
        assert down.returncode == 0, down.stderr
        left = [pid for pid in node.seen if alive(pid)]
        assert not left, f"`shoal down` left {left}"


@pytest.fixture
def node(make_node: Callable[[str], Node]) -> Node:
    return make_node("node-a")


class Current:
    """The application that a server passes its requests to: starting a server costs more than a test."""

    def __init__(self) -> None:
        self.app: ASGIApp = Starlette()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


@pytest.fixture(scope="session")
def server() -> Iterator[tuple[Current, str]]:
    """A real server on a real port, in a thread, and its address."""
    current = Current()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        running = uvicorn.Server(
            uvicorn.Config(current, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        wait_until(lambda: running.started, "the test's gateway listens")
        yield current, f"http://127.0.0.1:{listener.getsockname()[1]}"
        running.should_exit = True
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


@pytest.fixture
def serve(server: tuple[Current, str]) -> Iterator[Callable[[ASGIApp], str]]:
    """Serve an application while the test runs; returns its address."""
    current, url = server

    def start(app: ASGIApp) -> str:
        current.app = app
        return url

    yield start
    current.app = Starlette()


@pytest.fixture
def cluster(serve: Callable[[ASGIApp], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cluster:
    """A gateway, and an environment in which commands talk to it."""
    made = Cluster()
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SHOAL_GATEWAY", serve(made.app))
    monkeypatch.delenv("SHOAL_DEBUG", raising=False)
    monkeypatch.delenv("SHOAL_SECRET", raising=False)
    monkeypatch.delenv("SHOAL_API_KEY", raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    return made


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home in which a node was once made, and does not run."""
    root = tmp_path / "home"
    root.mkdir(mode=0o700)
    settings = root / "node.toml"
    settings.write_text('id = "a"\n')
    settings.chmod(0o600)
    return Home(root)
