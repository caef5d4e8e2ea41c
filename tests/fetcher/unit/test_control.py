"""Pause, resume, cancel and delete while NATS or storage is out: a download runs or is paused, never neither."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import pytest

from shoal_common.errors import Busy
from shoal_common.messages.downloads import (
    CancelDownload,
    DownloadCommand,
    PauseDownload,
    ResumeDownload,
    StopDownloads,
)
from shoal_fetcher.downloads import request_store
from tests.fetcher.control_site import Control, downloads_of_a_node, model, settle

MAX_TURNS = 40
"""More turns of the loop than any command takes here."""


def command(control: Control, verb: str) -> Awaitable[object]:
    """Return a command for model `a`, not yet begun."""
    manager, name = control.manager, model("a")
    match verb:
        case "pause":
            return manager.pause(PauseDownload(model=name), "1")
        case "resume":
            return manager.resume(ResumeDownload(model=name), "1")
        case "cancel":
            return manager.cancel(CancelDownload(model=name), "1")
        case "more layers":
            return manager.download(DownloadCommand(model=name), "1")
    assert verb == "delete"
    return manager.stop_downloads(StopDownloads(repo="org/a"))


async def abandon(work: Awaitable[object], turns: int) -> None:
    """Begin a command, and cancel it after so many turns of the loop, as its deadline does."""
    task = asyncio.ensure_future(work)
    await settle(turns)
    task.cancel()
    await asyncio.wait({task})


def assert_runs_or_is_paused(control: Control) -> None:
    request, state = control.request("a"), control.state("a")
    if request is None:
        assert not control.runs("a") and state is None, "cancelled, and nothing is left"
    else:
        assert control.runs("a") != request.paused, "requested and nobody runs it, or paused and it runs"
        assert state is not None and (state.phase == "paused") == request.paused


@pytest.mark.parametrize("failed", [False, True])
@pytest.mark.parametrize("verb", ["pause", "resume", "cancel", "delete", "more layers"])
async def test_an_abandoned_command_leaves_one_that_runs_or_rests(verb: str, failed: bool) -> None:
    for turns in range(MAX_TURNS):
        async with downloads_of_a_node() as control:
            # Which layers are enough is known before the manifest is; later it is the whole model here.
            control.storage.hanging_manifests = verb == "more layers"
            await control.download("a", layers=[0, 1])
            if verb == "resume":
                await control.manager.pause(PauseDownload(model=model("a")), "0")
            control.outage.begin()
            await abandon(command(control, verb), turns)
            control.outage.end(failed)
            await settle()
            assert_runs_or_is_paused(control)


@pytest.mark.parametrize("verb", ["pause", "resume", "cancel", "delete", "more layers"])
async def test_a_cancelled_command_leaves_one_that_runs_or_rests(verb: str) -> None:
    for turns in range(MAX_TURNS):
        async with downloads_of_a_node() as control:
            # Which layers are enough is known before the manifest is; later it is the whole model here.
            control.storage.hanging_manifests = verb == "more layers"
            await control.download("a", layers=[0, 1])
            if verb == "resume":
                await control.manager.pause(PauseDownload(model=model("a")), "0")
            await abandon(command(control, verb), turns)
            await settle()
            assert_runs_or_is_paused(control)


async def test_a_cancel_that_hangs_holds_up_no_other_model() -> None:
    async with downloads_of_a_node() as control:
        await control.download("a")
        await control.download("b")
        control.storage.hanging_releases.add("org/a")
        cancelling = asyncio.ensure_future(command(control, "cancel"))
        await settle()
        pausing = asyncio.ensure_future(control.manager.pause(PauseDownload(model=model("b")), "2"))
        await settle()
        assert pausing.done() and pausing.result() == {"models": {model("b"): "paused"}}
        assert not cancelling.done()
        cancelling.cancel()


async def test_a_pause_of_all_waits_for_each_and_names_each() -> None:
    async with downloads_of_a_node() as control:
        for name in "abc":
            await control.download(name)
        paused = await control.manager.pause(PauseDownload(), "1")
        assert paused == {"models": {model(name): "paused" for name in "abc"}}
        assert not any(control.runs(name) for name in "abc")


async def test_downloads_asked_for_at_once_stay_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_store, "MAX_DOWNLOADS", 2)
    async with downloads_of_a_node() as control:
        pulls = [
            asyncio.ensure_future(control.manager.download(DownloadCommand(model=model(name)), name))
            for name in "abc"
        ]
        await settle()
        assert [pull.done() for pull in pulls].count(True) == 1
        (refused,) = [pull for pull in pulls if pull.done()]
        assert isinstance(refused.exception(), Busy)
        assert sum(control.runs(name) for name in "abc") == 2
        for pull in pulls:
            pull.cancel()
