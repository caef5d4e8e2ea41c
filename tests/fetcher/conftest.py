"""Two nodes, a hub and NATS for all whole-service tests of the fetcher; each test pulls its own model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shoal_demo.hub_server import RunningHub, running_hub
from tests.fetcher.pull_site import Site, site_of_a_test
from tests.harness.nats import NatsServer
from tests.harness.node import Node, running_nodes, wait_ready

SERVICES = ("storage", "fetcher", "fileserver")


@pytest.fixture(scope="package")
def hub_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the models that tests pull."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="package")
def running(
    tmp_path_factory: pytest.TempPathFactory, hub_root: Path
) -> Iterator[tuple[NatsServer, RunningHub, dict[str, Node]]]:
    """NATS, a hub over `hub_root`, and the nodes a and b. Tests that need more nodes add them."""
    homes = tmp_path_factory.mktemp("nodes")
    with NatsServer(homes / "nats") as server, running_hub(hub_root, other_lfs_host=True, process=True) as hub:
        made = [Node(homes / n, n, server.url, SERVICES, HF_ENDPOINT=hub.base_url) for n in ("a", "b")]
        with running_nodes(*made) as nodes:
            asyncio.run(wait_ready(server, *nodes))
            yield server, hub, {n.id: n for n in nodes}


@pytest.fixture
def site(
    running: tuple[NatsServer, RunningHub, dict[str, Node]],
    hub_root: Path,
    fresh: Callable[[str], str],
    request: pytest.FixtureRequest,
) -> Iterator[Site]:
    """The shared nodes with a healthy hub; afterwards every store is checked (I1, I2)."""
    server, hub, nodes = running
    with site_of_a_test(Site(server, hub, hub_root, nodes, repo=f"org/{fresh('model')}")) as site:
        yield site


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Add the services' logs to the report of a failed test."""
    report = yield
    found = getattr(item, "funcargs", {}).get("site")
    if found is not None and call.excinfo is not None:
        report.sections.append(("services", "\n".join(n.log() for n in found.nodes.values())))  # type: ignore[attr-defined]  # pytest types the yield as None
    return report
