"""The nodes that tests share are put back after a test that failed while it had killed or paused something."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from shoal_demo.hub_server import RunningHub
from tests.fetcher.pull_site import Site, site_of_a_test
from tests.harness.fresh import Fresh
from tests.harness.nats import NatsServer
from tests.harness.node import Node


class FailedAssertion(Exception):
    """Stands for a test's failed assertion."""


@pytest.mark.parametrize("what", ["killed", "stopped", "paused", "changed", "without NATS"])
def test_a_site_left_broken_by_a_test_serves_the_next(
    running: tuple[NatsServer, RunningHub, dict[str, Node]], hub_root: Path, fresh: Fresh, what: str
) -> None:
    server, hub, nodes = running
    shared = Site(server, hub, hub_root, nodes, repo=f"org/{fresh('model')}")
    with pytest.raises(FailedAssertion), site_of_a_test(shared) as site:
        match what:
            case "killed":
                site["a"]["fetcher"].kill()
                site["b"]["storage"].kill()
            case "stopped":
                site["a"]["storage"].stop()
            case "paused":
                site["a"]["storage"].send(signal.SIGSTOP)
            case "changed":
                site["a"]["fetcher"].kill()
                site["a"]["fetcher"].start(HF_ENDPOINT="http://127.0.0.1:9")
            case _:
                site.server.kill()
        raise FailedAssertion

    async def pull() -> None:
        async with site.join() as here:
            await here.pull_ok("a")
            await here.assert_complete("a", files)

    with site_of_a_test(shared) as site:
        site.make(files := {"config.json": site.repo.encode()})
        asyncio.run(pull())
