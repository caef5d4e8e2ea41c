"""What all tests share: the tree on the path, real NATS servers, and `async def` tests under a deadline."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parents[1]
# The tree itself, whatever is installed: a checkout is tested by its own code.
sys.path[:0] = [
    str(p)
    for p in (ROOT, ROOT / "libs" / "common", ROOT / "cli", ROOT / "demo", ROOT / "bench", *ROOT.glob("services/*"))
]

from tests.harness.nats import NatsServer  # noqa: E402  # after the path is set

TEST_DEADLINE_S = 120.0

# No rule is broken by a slow machine: Hypothesis would take 200 ms for an example as a failure.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So a shell starts what runs in the background; all that tests start would be deaf to Ctrl-C with us.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run an `async def` test to its end, or to TEST_DEADLINE_S, or what it is marked with."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    marked = pyfuncitem.get_closest_marker("deadline_s")
    asyncio.run(asyncio.wait_for(pyfuncitem.obj(**arguments), marked.args[0] if marked else TEST_DEADLINE_S))
    return True


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
def fresh() -> Callable[[str], str]:
    """Names that no other test of this run uses: `fresh("node")` is `node-7`."""
    count = itertools.count(1)
    return lambda stem: f"{stem}-{next(count)}"
