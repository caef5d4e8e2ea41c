"""Clusters of whole nodes. One is shared by tests that leave it unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal_demo import MODELS_DIR
from shoal_demo.hub_server import RunningHub, running_hub
from tests.harness.shoal import ShoalCluster, restore_clusters


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Put back what a failed test has killed or paused, before the next uses it."""
    restore_clusters()


@pytest.fixture(scope="module")
def hub() -> Iterator[RunningHub]:
    """The tiny hub; `quiet_hub` resets its faults and counters before a test."""
    with running_hub(MODELS_DIR, process=True) as running:
        yield running


@pytest.fixture
def quiet_hub(hub: RunningHub) -> Iterator[RunningHub]:
    """The hub without faults, its counters at zero."""
    hub.reset_faults()
    hub.reset_stats()
    yield hub
    hub.reset_faults()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, hub: RunningHub) -> Iterator[ShoalCluster]:
    """A cluster of three nodes."""
    root: Path = tmp_path_factory.mktemp("cluster")
    with ShoalCluster(root, hub.base_url) as running:
        yield running
