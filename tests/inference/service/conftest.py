"""Fixtures of the stage tests: tiny models, one event loop, and rings that several tests share."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.inference.stage_ring import WAIT_TIMEOUT_S, RingOfStages
from tests.inference.tiny_models import write_model

ROOT = Path(__file__).parents[3]
SERVICE = str(ROOT / "services" / "inference")

T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, T]], T]
Models = Callable[..., Path]
Rings = Callable[..., RingOfStages]


@pytest.fixture(scope="session", autouse=True)
def children_import_the_service() -> Iterator[None]:
    """Child processes inherit the environment and must find the package wherever the tests run from."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = SERVICE if before is None else f"{SERVICE}:{before}"
    yield
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="session")
def run(runner: asyncio.Runner) -> Run[Any]:
    """Return a function that runs a coroutine on the session's loop, with a deadline."""

    def bounded(work: Coroutine[Any, Any, T]) -> T:
        async def within() -> T:
            async with asyncio.timeout(3 * WAIT_TIMEOUT_S):
                return await work

        return runner.run(within())

    return bounded


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Return a function: models("qwen3", bits=4) is the directory of that tiny model, written once."""
    root = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}

    def get(name: str, **options: Any) -> Path:
        key = "-".join([name, *(f"{k}{v}" for k, v in sorted(options.items()))])
        if key not in made:
            made[key] = write_model(root / key, name, **options)
        return made[key]

    return get


@pytest.fixture(scope="session")
def shared_rings(run: Run[Any]) -> Iterator[Rings]:
    """Rings that outlive a test: importing mlx-lm takes each child most of a second."""
    made: dict[tuple[Path, tuple[int, ...]], RingOfStages] = {}

    def get(model_dir: Path, cuts: Sequence[int]) -> RingOfStages:
        key = (model_dir, tuple(cuts))
        if key in made and not run(made[key].works()):
            run(made.pop(key).stop())  # a failed test has left it so
        if key not in made:
            made[key] = run(RingOfStages(model_dir, cuts).start())
        return made[key]

    yield get
    for ring in made.values():
        run(ring.stop())


@pytest.fixture
def rings(shared_rings: Rings, run: Run[Any]) -> Iterator[Rings]:
    """Shared rings; each is checked to hold no request at the end of the test."""
    used: list[RingOfStages] = []

    def get(model_dir: Path, cuts: Sequence[int]) -> RingOfStages:
        used.append(shared_rings(model_dir, cuts))
        return used[-1]

    yield get
    for ring in used:
        run(ring.check_idle())


@pytest.fixture
def own_ring(run: Run[Any]) -> Iterator[Rings]:
    """A ring for one test, which may break it: own_ring(model_dir, cuts, step_timeout_s=2)."""
    made: list[RingOfStages] = []

    def get(model_dir: Path, cuts: Sequence[int], **settings: Any) -> RingOfStages:
        ring = RingOfStages(model_dir, cuts, **settings)
        made.append(ring)
        run(ring.start())
        return ring

    yield get
    for ring in made:
        run(ring.stop())
