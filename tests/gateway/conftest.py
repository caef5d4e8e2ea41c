"""One gateway process for all tests here, with its own NATS; the test's process plays the other services."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.gateway.running_gateway import RunningGateway, running_gateway
from tests.harness.nats import NatsServer
from tests.harness.process import is_at_work


class SharedGateway:
    """A NATS server and the gateway of node `here` on it, started again when a failed test has left them broken."""

    def __init__(self, directory: Path, nats: NatsServer, stack: ExitStack) -> None:
        self._directory, self._nats, self._stack = directory, nats, stack
        self._started: list[RunningGateway] = []

    def running(self) -> RunningGateway:
        """Return the gateway, which runs."""
        nats_was_broken = self._nats.restore()
        if nats_was_broken or not self._started or not is_at_work(self._started[-1].process):
            for broken in self._started[-1:]:
                broken.process.kill()
            home = self._directory / f"home-{len(self._started)}"
            self._started.append(self._stack.enter_context(running_gateway(home, self._nats)))
        return self._started[-1]

    def check_logs(self) -> None:
        """Require that no log holds an error."""
        for gateway in self._started:
            log = gateway.log.read_text()
            assert "Traceback" not in log and "level=error" not in log, log


@pytest.fixture(scope="session")
def shared_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedGateway]:
    """One gateway for the session; at the end its log must hold no errors."""
    directory = tmp_path_factory.mktemp("gateway")
    with NatsServer(directory / "nats") as nats, ExitStack() as stack:
        shared = SharedGateway(directory, nats, stack)
        yield shared
        shared.check_logs()


@pytest.fixture
def gateway(shared_gateway: SharedGateway) -> RunningGateway:
    """The shared gateway of node `here`, running."""
    return shared_gateway.running()
