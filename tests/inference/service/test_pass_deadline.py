"""The deadline of a pass, which counts only while its process runs."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from shoal_inference.stage.requests.pipeline import in_time

_STOPPED_MEANWHILE = """
import asyncio, sys
from shoal_inference.stage.requests.pipeline import in_time

async def main():
    going = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), going.set)

    async def computing():
        print("computing", flush=True)
        await going.wait()
        return "computed"

    print(await in_time(computing(), 5.0), flush=True)

asyncio.run(main())
"""


async def test_only_a_pass_that_takes_too_long_times_out() -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    async def immediate() -> str:
        return "computed"

    with pytest.raises(TimeoutError):
        await in_time(never(), 0.01)
    assert await in_time(immediate(), 10.0) == "computed"
    assert await in_time(immediate(), None) == "computed"


async def test_an_error_of_the_pass_is_raised_as_it_is() -> None:
    async def fails() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await in_time(fails(), 10.0)


async def test_cancelling_the_caller_cancels_the_pass() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def long() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    waiting = asyncio.create_task(in_time(long(), 60.0))
    await begun.wait()
    waiting.cancel()
    async with asyncio.timeout(10):
        await ended.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="a process's state is read from /proc")
def test_time_in_which_the_process_was_stopped_does_not_count() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", _STOPPED_MEANWHILE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout is not None and child.stdin is not None
        assert child.stdout.readline() == "computing\n"
        os.kill(child.pid, signal.SIGSTOP)
        try:
            # Longer than the deadline, which must pass here.
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(timeout=5.5)
        finally:
            os.kill(child.pid, signal.SIGCONT)
        child.stdin.write("go\n")
        child.stdin.flush()
        assert child.stdout.readline() == "computed\n"
