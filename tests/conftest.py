"""What all tests share: real NATS servers, fresh names, and `async def` tests under a deadline."""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.harness import forked
from tests.harness.fresh import Fresh
from tests.harness.identities import Authority
from tests.harness.nats import NatsServer
from tests.harness.ports import held_closed

pytest_plugins = ("tests.harness.order", "tests.harness.strict_skips", "tests.harness.unit_guard")

TEST_DEADLINE_S = 120.0

# No rule is broken by a slow machine: Hypothesis would take 200 ms for an example as a failure.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

forked.is_enabled = True

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So a shell starts what runs in the background; all that tests start would be deaf to Ctrl-C with us.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Run an `async def` test to its end, or to TEST_DEADLINE_S, or what it is marked with."""
    if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
        marked = item.get_closest_marker("deadline_s")
        item.obj = _run_within(marked.args[0] if marked else TEST_DEADLINE_S, item.obj)


def _run_within(deadline_s: float, test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        asyncio.run(asyncio.wait_for(test(**arguments), deadline_s))

    return run


@pytest.fixture(autouse=True)
def own_hub_client() -> Iterator[None]:
    """Give huggingface_hub its own client again: a fetcher in this process has given it another one."""
    yield
    if http := sys.modules.get("huggingface_hub.utils._http"):
        http.set_client_factory(http.default_client_factory)


@pytest.fixture(scope="session")
def nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A NATS server for all tests that leave it alone. Its keys outlive a test: use names from `fresh`."""
    with NatsServer(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture
def own_nats(tmp_path: Path) -> Iterator[NatsServer]:
    """A NATS server of this test alone, to stop, kill, restart or wipe."""
    with NatsServer(tmp_path / "nats") as server:
        yield server


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The authority of the members in all tests with real services."""
    return Authority(tmp_path_factory.mktemp("nodes"))


@pytest.fixture(scope="session")
def members_nats(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[NatsServer]:
    """A NATS server for all tests with members that leave it alone. Use names from `fresh`."""
    with NatsServer(tmp_path_factory.mktemp("nats"), authority=authority) as server:
        yield server


@pytest.fixture
def own_members_nats(tmp_path: Path, authority: Authority) -> Iterator[NatsServer]:
    """A NATS server of this test alone for members."""
    with NatsServer(tmp_path / "nats", authority=authority) as server:
        yield server


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of this machine where nobody listens, nor can begin to."""
    with held_closed() as number:
        yield number


@pytest.fixture(scope="session")
def fresh() -> Fresh:
    """Names that no other test of this run uses: `fresh("node")` is `node-0007`: none begins with another."""
    count = itertools.count(1)
    return lambda stem: f"{stem}-{next(count):04}"
