"""A hub with one repository, and clients for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi

from shoal_demo.hub_server import RunningHub, running_hub
from tests.hub.hub_fixtures import FILES, LFS_FROM_BYTES, MODEL, write_files


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    write_files(root / MODEL, FILES)
    return root


@pytest.fixture(scope="module")
def module_hub(root: Path) -> Iterator[RunningHub]:
    with running_hub(root, lfs_from_bytes=LFS_FROM_BYTES) as hub:
        yield hub


@pytest.fixture
def hub(module_hub: RunningHub) -> RunningHub:
    module_hub.reset_faults()
    module_hub.reset_stats()
    return module_hub


@pytest.fixture
def api(hub: RunningHub) -> HfApi:
    return HfApi(endpoint=hub.base_url, token=False)


@pytest.fixture
def web(hub: RunningHub) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=hub.base_url, follow_redirects=True, trust_env=False) as client:
        yield client
