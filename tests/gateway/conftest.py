"""One gateway process for all tests here, with its own NATS; the test's process plays the other services."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.gateway.running_gateway import RunningGateway, running_gateway
from tests.harness.nats import NatsServer


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """The gateway of node `here`, shared by the session; at the end its log must hold no errors."""
    directory = tmp_path_factory.mktemp("gateway")
    with NatsServer(directory / "nats") as nats, running_gateway(directory / "home", nats) as running:
        yield running
        log = running.log.read_text()
        assert "Traceback" not in log and "level=error" not in log, log
