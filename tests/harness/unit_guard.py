"""A pytest plugin: a test below a directory `unit` fails if it starts a process, connects to NATS or loads MLX."""

from __future__ import annotations

import sys
from collections.abc import Generator
from typing import Any

import pytest
from nats.aio.client import Client

_STARTS = frozenset(
    ("subprocess.Popen", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system")
)
_connect = Client.connect


class UnitRuleBroken(AssertionError):
    """A unit test does what only service tests may do."""


class _Guard:
    """What the running unit test did that it must not; None while no unit test runs."""

    def __init__(self) -> None:
        self.found: list[str] | None = None

    def refuse(self, what: str) -> None:
        """Note it, because the test may catch this exception; raise UnitRuleBroken while a unit test runs."""
        if self.found is not None:
            self.found.append(what)
            raise UnitRuleBroken(what)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Hear what the interpreter is about to do, on any thread."""
        if self.found is None:
            return
        if event in _STARTS:
            self.refuse(f"it starts a process ({event})")
        elif event == "import" and str(arguments[0]).split(".")[0] == "mlx":
            self.refuse("it loads MLX")


_guard = _Guard()


async def _refused_connect(self: Client, *arguments: Any, **options: Any) -> None:
    _guard.refuse("it connects to NATS")
    await _connect(self, *arguments, **options)


def pytest_configure() -> None:
    """Listen for the rest of the process: the interpreter forgets no audit hook."""
    sys.addaudithook(_guard.audit)
    Client.connect = _refused_connect  # type: ignore[method-assign]  # the one place all connections pass


def is_unit(item: pytest.Item) -> bool:
    """Return whether a test is below a directory called `unit`."""
    return "unit" in item.path.parts[:-1]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Listen while a unit test and its fixtures run."""
    _guard.found = [] if is_unit(item) else None
    try:
        return (yield)
    finally:
        _guard.found = None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """Fail a test that caught the refusal."""
    yield
    if _guard.found:
        raise UnitRuleBroken(f"a unit test must not do this: {', '.join(sorted(set(_guard.found)))}")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fail a run of unit tests alone whose modules load MLX; among others nobody can tell who loaded it."""
    if session.items and all(map(is_unit, session.items)) and "mlx.core" in sys.modules:
        raise pytest.UsageError("a module of unit tests loads MLX, or one that it imports does")
