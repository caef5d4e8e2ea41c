"""Every other rank's side of a request: frames in order, each through the own layers and on."""

from __future__ import annotations

import asyncio

import msgspec

from shoal_common.errors import Busy, Expired, InternalError, ShoalError
from shoal_common.logs import StructuredLogger
from shoal_common.messages import DECODE_ERRORS
from shoal_inference.stage.compute.engine import Hidden
from shoal_inference.stage.requests.pipeline import StagePipeline
from shoal_inference.stage.requests.request_table import RequestState
from shoal_inference.stage.ring.frames import End, Flag, Frame, Kind, Open

log = StructuredLogger("stage.follower")


class FollowerDriver:
    """Handles one frame at a time; what it has not taken yet waits in the socket, and slows its sender."""

    def __init__(self, core: StagePipeline) -> None:
        self._core = core

    async def on_frame(self, frame: Frame) -> None:
        """A frame from the predecessor. Raises FatalError only; a request's errors end that request."""
        core, header = self._core, frame.header
        if header.kind is Kind.OPEN:
            await self._open(frame)
            return
        entry = core.requests.get(header.request)
        if header.kind in (Kind.END, Kind.FAIL):
            self._end(frame, entry)
        elif entry is None:
            if core.requests.unknown(header.request):
                log.debug("frame of an ended request dropped", kind=header.kind.name)
        else:
            try:
                await self._hidden(frame, entry)
            except ShoalError as error:
                core.fail_request(entry, error)

    async def sweep(self) -> None:
        """For ever: end requests whose frames have stopped coming. Sleeps while there are none."""
        core = self._core
        limit_s = core.start.idle_limit_s or 4 * core.start.step_timeout_s
        loop = asyncio.get_running_loop()
        while True:
            await core.requests.some.wait()
            await asyncio.sleep(limit_s / 4)
            for entry in core.requests:
                if loop.time() - entry.touched_s > limit_s:
                    what = f"rank {core.start.rank} received no frame of request {entry.request} for {limit_s} s"
                    core.fail_request(entry, Expired(f"{what}; its caches are freed"))

    async def _open(self, frame: Frame) -> None:
        core, key = self._core, frame.header.request
        try:
            ask = msgspec.json.decode(frame.meta, type=Open)
        except DECODE_ERRORS as error:
            log.warning("undecodable OPEN frame dropped", reason=str(error))
            return
        entry = RequestState(key, ask.request, asyncio.get_running_loop().time())
        entry.next_index = ask.first_index
        full = len(core.requests) >= core.start.max_requests
        core.requests.add(entry)
        try:
            if full:
                raise Busy(
                    f"rank {core.start.rank} has {core.start.max_requests} requests in flight, the most it allows"
                )
            await core.on_thread(core.engine.open, key, ask)
        except ShoalError as error:
            core.fail_request(entry, error)
            return
        if not core.is_last and core.requests.get(key) is entry:
            core.send_control(frame)

    async def _hidden(self, frame: Frame, entry: RequestState) -> None:
        core, header = self._core, frame.header
        if header.kind is not Kind.HIDDEN or header.seq != entry.next_seq + 1:
            raise InternalError(
                f"{header.kind.name} {header.seq} reached rank {core.start.rank} "
                f"when pass {entry.next_seq + 1} was due"
            )
        entry.touched_s = asyncio.get_running_loop().time()
        hidden = Hidden(header.dtype, (header.batch, header.tokens, header.width), frame.payload)
        await core.loaded.wait()
        sample = Flag.SAMPLE in header.flags
        await core.step(entry, hidden, sample, compute_s=core.start.step_timeout_s)

    def _end(self, frame: Frame, entry: RequestState | None) -> None:
        """END and FAIL free what is held here and go on to those who may hold more; unknown ones are normal."""
        core, kind = self._core, frame.header.kind
        if entry is not None and core.is_last and kind is Kind.END and _reason(frame) == "cancelled":
            core.requests.say_cancelled(entry)
        elif entry is not None:
            core.requests.end(entry)
        if kind is Kind.FAIL or not core.is_last:
            core.send_control(frame)


def _reason(frame: Frame) -> str:
    try:
        return msgspec.json.decode(frame.meta, type=End).reason
    except DECODE_ERRORS:
        return ""
