"""A stage that ends is started again, unless another attempt must fail in the same way."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec import structs

from shoal_common.concurrency.backoff import Backoff
from shoal_common.errors import LoadError, ShoalError, StageLost, Unavailable, Unsupported
from shoal_common.messages.instances import InstanceSpec, StageSpec, StageState
from shoal_inference import stage_runner
from shoal_inference.assignments import Assignment
from shoal_inference.stage.ipc import messages
from shoal_inference.stage_runner import StageRunner

ATTEMPTS = 5
STAGE = StageSpec(rank=0, node="a", first_layer=0, last_layer=2)
SPEC = InstanceSpec(id="i1", repo="org/name", commit="0" * 40, stages=[STAGE], context_tokens=256, epoch=1)


class FailingRunner(StageRunner):
    """Runs a stage whose process ends with an error; `published` are its states."""

    def __init__(self, error: ShoalError) -> None:
        self.published: list[StageState] = []
        self.attempts = 0
        self.enough = asyncio.Event()
        self._error = error
        self.reported: list[str] = []

        async def put(_: str, state: StageState) -> None:
            self.published.append(state)

        unused: Any = SimpleNamespace(client=None, js=None, node="a")
        buckets: Any = SimpleNamespace(state=SimpleNamespace(put=put), done=None)
        super().__init__(Assignment(SPEC, STAGE), unused, unused, buckets, *([unused] * 5))

    async def _fetch(self) -> None:
        self.attempts += 1
        if self.attempts == ATTEMPTS:
            self.enough.set()

    async def _run_process(self) -> None:
        raise self._error


async def run(error: ShoalError, monkeypatch: pytest.MonkeyPatch) -> FailingRunner:
    """Run a stage until it has been started often enough, or nothing happens any more."""
    monkeypatch.setattr(stage_runner, "_RESPAWN_BACKOFF", Backoff(0.0, 0.0))
    runner = FailingRunner(error)
    running = asyncio.create_task(runner.run())
    for _ in range(20 * ATTEMPTS):
        await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return runner


async def test_a_stage_that_died_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = await run(StageLost("killed by signal 9"), monkeypatch)
    assert runner.enough.is_set()


async def test_a_model_that_is_not_supported_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = await run(Unsupported("its tokenizer aborts"), monkeypatch)
    assert runner.attempts == 1
    assert runner.published[-1].phase == "failed"
    assert runner.published[-1].error == Unsupported("its tokenizer aborts").body()


async def test_a_lost_neighbour_is_named_until_the_ring_is_closed() -> None:
    runner = FailingRunner(StageLost("unused"))
    runner._spec = structs.replace(SPEC, stages=[STAGE, StageSpec(rank=1, node="b", first_layer=2, last_layer=4)])

    async def report(node: str, _: str) -> None:
        runner.reported.append(node)

    runner._peer_failures = SimpleNamespace(report=report)  # type: ignore[assignment]  # all that is used of it
    await runner._handle_event(messages.Unlinked(rank=1, reason="connection reset"))
    lost = runner.published[-1]
    assert (lost.phase, runner.reported) == ("linking", ["b"])
    assert lost.error is not None and "stage 1 on node b is lost: connection reset" in lost.error.message
    unusable = Unavailable("no address of stage 1 on node b can be used").body()
    await runner._note_link_error(unusable)
    assert runner.published[-1].error == unusable
    await runner._handle_event(messages.Linked())
    linked = runner.published[-1]
    assert (linked.phase, linked.error) == ("ready", None)


async def test_files_that_do_not_load_are_tried_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "cannot load the tokenizer in /m: tokenizer.json holds a list, not an object"
    runner = await run(LoadError(reason), monkeypatch)
    assert runner.attempts == 3
    last = runner.published[-1]
    assert last.phase == "failed" and last.error is not None
    assert last.error.code == "load_failed"
    assert last.error.message == f"{reason}; tried 3 times: repair the model, then place it again"
