"""Whole nodes for tests: `shoal up` with its supervisor, as a person starts it, on free ports in a temporary home."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx2

from shoal_cli.membership.operator_files import OperatorFiles
from shoal_cli.node.children.restart_policy import ChildStatus
from shoal_cli.node.down import supervisor_status
from shoal_cli.node_home import Home
from shoal_common.bus.connection import Nats, NatsLogin, connected
from shoal_common.identity.api_key import read_api_key
from shoal_common.identity.tls import client_context
from tests.harness.process import is_paused

UP_DEADLINE_S = 90.0
DOWN_DEADLINE_S = 60.0
WAIT_DEADLINE_S = 60.0
_POLL_S = 0.05
_GIVEN = {"SHOAL_MEMORY_BYTES_PER_S": "10e9", "SHOAL_FILESERVER_PORT": "0", "SHOAL_STAGE_PORT": "0"}
"""Set, so that no node of a test measures it, and tests do not compete for the usual ports."""

T = TypeVar("T")


def eventually(poll: Callable[[], T | None], what: str, deadline_s: float = WAIT_DEADLINE_S) -> T:
    """Return the first truthy result of `look`; raises AssertionError naming `what` after the deadline."""
    give_up_s = time.monotonic() + deadline_s
    while True:
        found = poll()
        if found:
            return found
        assert time.monotonic() < give_up_s, f"not within {deadline_s:.0f} s: {what}"
        time.sleep(_POLL_S)


class ShoalNode:
    """A node, its processes and its API."""

    def __init__(self, home: Path, environ: dict[str, str]) -> None:
        self.home, self.node = home, home.name
        self._environ = environ
        self.client = httpx2.Client(timeout=120)
        self.within: tuple[str, ...] = ()
        """Prefix of its command, such as `ip netns exec`."""
        self._up_arguments: tuple[str, ...] = ()

    @property
    def environ(self) -> dict[str, str]:
        """Environment of a command on this node."""
        return {**self._environ, "SHOAL_HOME": str(self.home)}

    def shoal(
        self,
        *arguments: str,
        check: bool = False,
        stdin: str = "",
        timeout_s: float = WAIT_DEADLINE_S,
        **environ: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run a `shoal` command on this node, with these variables besides its usual ones."""
        result = subprocess.run(
            [*(self.within if arguments[0] == "up" else ()), sys.executable, "-m", "shoal_cli", *arguments],
            env={**self.environ, **environ},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert not check or result.returncode == 0, f"shoal {' '.join(arguments)}: {result.stderr}\n{self.logs()}"
        assert "Traceback" not in result.stderr, result.stderr
        return result

    def up(self, *arguments: str) -> None:
        """Start it and wait until it is ready."""
        self._up_arguments = arguments
        self.shoal(
            "up", "--detach", "--node", self.node, "--port", "0", *arguments, check=True, timeout_s=UP_DEADLINE_S
        )
        if key := read_api_key(self.home):  # not every system says whose a connection is
            self.client.headers["Authorization"] = f"Bearer {key}"

    def down(self) -> None:
        """Stop it; nothing of it remains running."""
        self.shoal("down", check=True, timeout_s=DOWN_DEADLINE_S)

    def restore(self) -> None:
        """Start again what a failed test has left dead or paused, and wait until all of it is ready."""
        if supervisor_status(Home(self.home)) is None:
            self.up(*self._up_arguments)
        for child in self.children().values():
            if child.pid and is_paused(child.pid):
                os.kill(child.pid, signal.SIGCONT)
        eventually(lambda: all(c.phase == "ready" for c in self.children().values()), f"{self.node} is as it began")

    @property
    def url(self) -> str:
        """Address of its gateway."""
        return (self.home / "run" / "gateway.url").read_text().strip()

    @property
    def nats_url(self) -> str:
        """Address of the NATS server that it runs."""
        ports = max((self.home / "run").glob("nats-server_*.ports"), key=lambda p: p.stat().st_mtime)
        return f"tls://{json.loads(ports.read_text())['nats'][0].rpartition('/')[2]}"

    @asynccontextmanager
    async def operator(self) -> AsyncIterator[Nats]:
        """Connect to its NATS as the cluster's operator, who may do everything."""
        files = OperatorFiles(self.home)
        login = NatsLogin(files.nkey, "_INBOX.test", client_context(files.authority))
        async with connected([self.nats_url], "test", WAIT_DEADLINE_S, login) as nats:
            yield nats

    def join(self, first: ShoalNode) -> None:
        """Become a member of the cluster that another node has started."""
        invitation = json.loads(first.shoal("invite", "--json", check=True).stdout)
        arguments = ("join", invitation["address"], "--code-file", "-", "--node", self.node)
        self.shoal(*arguments, check=True, stdin=invitation["code"])

    def call(self, method: str, path: str, body: object = None) -> Any:
        """Send a request to its API that has to succeed."""
        response = self.client.request(method, self.url + path, json=body)
        assert response.is_success, f"{method} {path}: {response.status_code} {response.text}\n{self.logs()}"
        return response.json()

    def status(self) -> dict[str, Any] | None:
        """Return `/v1/status`, or None while the gateway is down."""
        try:
            response = self.client.get(self.url + "/v1/status")
        except httpx2.TransportError:
            return None
        return dict(response.json()) if response.is_success else None

    def download(self, model: str, node: str | None = None) -> dict[str, Any] | None:
        """Return the state of a model's download on a node (this one)."""
        status = self.status() or {"downloads": []}
        own = [d for d in status["downloads"] if d["model"] == model and d["node"] == (node or self.node)]
        return own[0] if own else None

    def children(self) -> dict[str, ChildStatus]:
        """Return its services, and `nats` if it runs that, as the supervisor reports them."""
        status = supervisor_status(Home(self.home))
        assert status is not None, f"no supervisor answers in {self.home}"
        return {c.name: c for c in status.children}

    def child(self, service: str) -> ChildStatus:
        """Return one of them."""
        return self.children()[service]

    def kill(self, service: str) -> int:
        """Kill one service (SIGKILL); return its former pid."""
        pid = self.child(service).pid
        os.kill(pid, signal.SIGKILL)
        return pid

    def wait_reborn(self, service: str, old_pid: int) -> None:
        """Return once the supervisor has restarted a service and it is ready."""

        def reborn() -> bool:
            child = self.child(service)
            return child.phase == "ready" and child.pid not in (0, old_pid)

        eventually(reborn, f"{service} of {self.node} is ready again")

    def logs(self) -> str:
        """Return the end of every log, for a failing test."""
        out = []
        for log in sorted((self.home / "log").glob("*.log")):
            out.append(
                f"--- {self.node} {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-12:])
            )
        return "\n".join(out)


class ShoalCluster:
    """Several nodes on one NATS, which the first one runs. Stopped, in order, at the end of the context."""

    def __init__(self, root: Path, hub: str, names: tuple[str, ...] = ("a", "b", "c"), **environ: str) -> None:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SHOAL_", "HF_"))}
        self._environ = {**inherited, "HF_ENDPOINT": hub, "HOME": str(root), **_GIVEN, **environ}
        self.nodes = [ShoalNode(root / name, self._environ) for name in names]

    def __enter__(self) -> Self:
        try:
            self.nodes[0].up("--nats-port", "0")
            with ThreadPoolExecutor() as starting:
                list(starting.map(self._join_and_up, self.nodes[1:]))
        except BaseException:
            self._down()
            raise
        _running.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _running.remove(self)
        if error is not None:
            for node in self.nodes:
                print(node.logs())
        self._down()
        assert error is not None or not self.refused_subjects(), self.refused_subjects()

    def _join_and_up(self, node: ShoalNode) -> None:
        node.join(self.nodes[0])
        node.up()

    def refused_subjects(self) -> set[str]:
        """Return what NATS has refused the nodes' own services (I12): they are to need no more than they may."""
        logs = [log.read_text(errors="replace") for n in self.nodes for log in (n.home / "log").glob("*.log*")]
        return {line for text in logs for line in text.splitlines() if "NATS refused a subject" in line}

    def _down(self) -> None:
        for node in reversed(self.nodes):
            if (node.home / "run" / "supervisor.pid").exists():
                node.down()
            node.client.close()

    def __getitem__(self, name: str) -> ShoalNode:
        return next(n for n in self.nodes if n.node == name)


_running: list[ShoalCluster] = []


def restore_clusters() -> None:
    """Put every node of every running cluster back as it began, if a failed test has left it otherwise."""
    for cluster in _running:
        for node in cluster.nodes:
            node.restore()
