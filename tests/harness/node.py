"""The services of a node as real processes that can be killed, stopped and restarted one by one.

They belong to no event loop, so a module or a session may share them between tests. A service is ready when its own
process has its key in `live` and does its work: the fileserver has an address, the others wait for commands (a
command sent earlier runs, but its sender gets no reply).
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nats.js.errors import NotFoundError

from shoal_common.bus.keys import liveness_key
from shoal_common.messages.liveness import LivenessRecord
from shoal_common.store.store_paths import StorePaths
from tests.harness.forked import ForkedService
from tests.harness.nats import Joined, NatsServer, joined
from tests.harness.process import is_at_work, node_environment, start_service
from tests.harness.waiting import eventually

READY_DEADLINE_S = 60.0
STOP_DEADLINE_S = 15.0
_LOG_TAIL_LINES = 40
_TAKE_COMMANDS = ("storage", "fetcher")
_HAVE_ADDRESSES = ("fileserver", "gateway")


class ServiceProcess:
    """A service of a node: `python -m shoal_<service>`, its output in a file of the node's home.

    `within` is a command that runs it by exec, such as `ip netns exec`: its pid is the service's.
    """

    within: tuple[str, ...] = ()

    def __init__(self, service: str, home: Path, environment: dict[str, str]) -> None:
        self.service, self.environment = service, environment
        self.within: tuple[str, ...] = ()
        """Prefix of its command: where it runs."""
        self.log_path = home / f"{service}.log"
        self._process: subprocess.Popen[bytes] | ForkedService | None = None
        self._more: dict[str, str] = {}
        self._paused = False

    @property
    def pid(self) -> int:
        """Its process id, until the test has ended it."""
        assert self._process is not None, f"{self.service} is not running"
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self, **more: str) -> None:
        """Start it, with these variables besides its usual ones. Does not wait."""
        assert not self.running, f"{self.service} is running already"
        self._more, self._paused = more, False
        with self.log_path.open("ab") as output:
            self._process = start_service(self.service, {**self.environment, **more}, output, self.within)

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.running and self._process is not None:
            self._process.send_signal(number)
            # The signal arrives some time later.
            self._paused = number == signal.SIGSTOP or (self._paused and number != signal.SIGCONT)

    def kill(self) -> None:
        """Kill it (SIGKILL) and wait; does nothing if it has ended already."""
        self.send(signal.SIGKILL)
        self.wait_exit()

    def stop(self) -> int:
        """Stop it and wait. Returns its exit code."""
        self.send(signal.SIGTERM)
        return self.wait_exit()

    def restore(self) -> bool:
        """Start it again, as usual, if a test has left it dead, paused or with other variables; was it so?"""
        if self._process is not None and is_at_work(self._process) and not (self._more or self._paused):
            return False
        self.kill()
        self.start()
        return True

    def wait_exit(self) -> int:
        """Return its exit code once it has ended; kill it after STOP_DEADLINE_S."""
        if self._process is None:
            return 0
        try:
            return self._process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise AssertionError(f"{self.service} did not end within {STOP_DEADLINE_S} s:\n{self.log()}") from None

    def log(self) -> str:
        """Return all its output, of all its runs."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""


class Node:
    """A node: a home with `node.toml`, and some of its services."""

    def __init__(self, home: Path, node: str, nats_url: str, services: tuple[str, ...], **environment: str) -> None:
        home.mkdir(parents=True, exist_ok=True)
        (home / "node.toml").write_text(f'id = "{node}"\n')
        self.id, self.home = node, home
        self.layout = StorePaths(home / "store")
        usual = node_environment(home, nats_url, **environment)
        self.services = {name: ServiceProcess(name, home, usual) for name in services}

    def __getitem__(self, service: str) -> ServiceProcess:
        return self.services[service]

    def start(self, *names: str) -> None:
        """Start these services, or all of them, at once."""
        for name in names or self.services:
            self.services[name].start()

    async def ready(self, here: Joined, *names: str) -> None:
        """Return once these services, or all of them, are live. Fails with the log of one that has ended."""
        for name in names or self.services:
            service = self.services[name]

            async def live(service: ServiceProcess = service) -> bool:
                assert service.running, f"{service.service} of {self.id} ended:\n{service.log()}"
                found = await here.buckets.live.get_as(liveness_key(self.id, service.service), LivenessRecord)
                if found is None or found.holder.pid != service.pid:
                    return False
                if service.service in _TAKE_COMMANDS:
                    return await _waits_for_commands(here, f"{service.service}-{self.id}")
                return bool(found.facts.addresses) or service.service not in _HAVE_ADDRESSES

            await eventually(live, f"{name} of {self.id} is live", READY_DEADLINE_S)

    async def restart(self, here: Joined, service: str, **more: str) -> None:
        """Kill a service if it still runs, and start it again, with these variables besides its usual ones."""
        self.services[service].kill()
        self.services[service].start(**more)
        await self.ready(here, service)

    def stop(self) -> None:
        """Stop all services and wait. None is left running, whatever happens."""
        try:
            for service in self.services.values():
                service.send(signal.SIGTERM)
            for service in self.services.values():
                service.wait_exit()
        finally:
            for service in self.services.values():
                service.kill()

    def kill(self) -> None:
        """Kill all services, as a power cut does."""
        for service in self.services.values():
            service.send(signal.SIGKILL)
        for service in self.services.values():
            service.kill()

    def log(self) -> str:
        """Return the last lines of every service, for a failing test."""
        return "\n".join(
            f"--- {s.service} of {self.id}\n" + "\n".join(s.log().splitlines()[-_LOG_TAIL_LINES:])
            for s in self.services.values()
        )


def restore(server: NatsServer, *nodes: Node) -> list[str]:
    """Start again what a failed test has left dead or paused, and wait until it is ready. Returns what it was."""
    found = ["nats"] if server.restore() else []
    found += [f"{s.service} of {node.id}" for node in nodes for s in node.services.values() if s.restore()]
    if found:
        asyncio.run(wait_ready(server, *nodes))
    return found


async def wait_ready(server: NatsServer, *nodes: Node) -> None:
    """Return once all services of these nodes are live."""
    async with joined(server) as here:
        for node in nodes:
            await node.ready(here)


async def _waits_for_commands(here: Joined, durable: str) -> bool:
    try:
        return bool((await here.js.consumer_info("CMD", durable)).num_waiting)
    except NotFoundError:
        return False


@contextmanager
def running_nodes(*nodes: Node) -> Iterator[tuple[Node, ...]]:
    """Start nodes, and stop them at the end. Wait with `ready`."""
    try:
        for node in nodes:
            node.start()
        yield nodes
    finally:
        for node in nodes:
            for service in node.services.values():
                service.send(signal.SIGTERM)
        for node in nodes:
            node.stop()
