"""One gateway process for all tests here, on a NATS of its own; what else is needed plays in the test's process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.gateway.process import RunningGateway, running_gateway
from tests.harness.nats import NatsServer


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """The gateway of node `here`. Nothing it may not survive is done to it; its log holds no crash at the end."""
    directory = tmp_path_factory.mktemp("gateway")
    with NatsServer(directory / "nats") as nats, running_gateway(directory / "home", nats) as running:
        yield running
        log = running.log.read_text()
        assert "Traceback" not in log and "level=error" not in log, log
