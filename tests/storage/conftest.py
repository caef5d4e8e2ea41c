"""A store for a test, checked when the test ends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from shoal_demo.hub_server import running_hub
from tests.fetcher.pull_site import Site
from tests.harness.fresh import Fresh
from tests.harness.memory_directory import directory_in_memory
from tests.harness.nats import NatsServer
from tests.harness.node import Node, restore, running_nodes, wait_ready
from tests.storage.deletion_fixtures import NODE, SERVICES
from tests.storage.store_fixtures import Model, check_invariants


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """The path of a store. Whatever a test does to it, I1 and I2 hold at its end."""
    yield tmp_path / "store"
    check_invariants(tmp_path / "store")


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A directory in memory where there is one: for tests about failures, not durability."""
    with directory_in_memory() as directory:
        yield directory


@pytest.fixture
def apples() -> Model:
    """A model with a file in a subdirectory, an empty file, and a file that the hub names by its git sha1."""
    return Model(
        "org/apples",
        {"config.json": b"{}", "sub/weights.bin": b"w" * 3000, "empty": b"", "shared.bin": b"both have these" * 50},
        by_git=("config.json",),
    )


@pytest.fixture
def pears() -> Model:
    """A model that shares a blob with `apples`."""
    return Model("org/pears", {"pears.bin": b"p" * 2000, "other-name.bin": b"both have these" * 50})


@pytest.fixture(scope="module")
def site_of_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One node with NATS and a hub, for all rows."""
    home = tmp_path_factory.mktemp("deletes")
    models = home / "models"
    models.mkdir()
    with NatsServer(home / "nats") as server, running_hub(models, process=True) as hub:
        usual = {"HF_ENDPOINT": hub.base_url, "SHOAL_HEADROOM_BYTES": "0"}
        with running_nodes(Node(home / NODE, NODE, server.url, SERVICES, **usual)) as (node,):
            asyncio.run(wait_ready(server, node))
            yield Site(server, hub, models, {NODE: node}, repo="")


@pytest.fixture
def site(site_of_all: Site, fresh: Fresh) -> Iterator[Site]:
    """The same, with a model of this test."""
    restore(site_of_all.server, *site_of_all.nodes.values())
    yield msgspec.structs.replace(site_of_all, repo=f"org/{fresh('deleted')}")
    site_of_all.hub.reset_faults()
