"""The child from start to exit: everything in one task group, and three ways out of it."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from shoal_common.errors import BadInput, ErrorBody, InternalError, Unavailable
from shoal_common.identity.tls import client_context, server_context
from shoal_common.logs import StructuredLogger
from shoal_common.messages.generation import TokenEvent
from shoal_common.redaction import remember_secret
from shoal_inference.stage import logs
from shoal_inference.stage.errors import BadControl, FatalError, LoadFailed
from shoal_inference.stage.ipc.child import Channel, ParentGone
from shoal_inference.stage.ipc.messages import (
    Cancel,
    Fatal,
    GetStats,
    Listening,
    RequestEvent,
    SetSuccessor,
    StageStats,
    Start,
    StartRequest,
    Stop,
)
from shoal_inference.stage.requests.follower import FollowerDriver
from shoal_inference.stage.requests.lease_lock import hold
from shoal_inference.stage.requests.pipeline import StagePipeline
from shoal_inference.stage.requests.rank0 import Rank0Driver
from shoal_inference.stage.ring.connection import RingAddress
from shoal_inference.stage.ring.frames import MAX_PAYLOAD_BYTES
from shoal_inference.stage.ring.handshake import RingPlace
from shoal_inference.stage.ring.ring import Predecessor, Successor

START_WITHIN_S = 30.0
_OOM_SCORE, _FIRST_TO_GO = Path("/proc/self/oom_score_adj"), "500"
"""Where the kernel has to kill for memory, a stage can be started again; NATS and storage are everybody's."""

log = StructuredLogger("stage")


class _Stopped(Exception):
    """The parent said `Stop`."""


async def run(control_fd: int) -> int:
    """Serve until told to stop, until the parent is gone (both 0), or until it cannot go on (1)."""
    # A Ctrl-C in the parent's terminal reaches the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _go_first()
    level = os.environ.get("SHOAL_LOG") or "info"
    logs.configure(level=level)
    channel = await Channel.open(control_fd)
    last_words: ErrorBody | None = None
    try:
        await _serve(channel, level)
    except* (_Stopped, ParentGone):
        pass
    except* FatalError as group:
        last_words = _first(group).body()
    except* Exception as group:  # noqa: BLE001  (a bug: the parent gets a message, the log gets the trace)
        log.error("stage failed", exc=group)
        last_words = InternalError(f"{_first(group)!r}: see the stage's log").body()
    if last_words is None:
        return 0
    log.error("stage exits", code=last_words.code, reason=last_words.message)
    channel.emit(Fatal(error=last_words))
    await channel.flush()
    return 1


E = TypeVar("E", bound=Exception)


def _first(group: BaseExceptionGroup[E]) -> E:
    found = group.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found


def _go_first() -> None:
    with suppress(OSError):  # not Linux
        _OOM_SCORE.write_text(_FIRST_TO_GO)


async def _serve(channel: Channel, level: str) -> None:
    try:
        async with asyncio.timeout(START_WITHIN_S):
            start = await channel.receive()
    except TimeoutError as error:
        raise BadControl(f"the parent sent nothing for {START_WITHIN_S} s: it must send Start first") from error
    if not isinstance(start, Start):
        raise BadControl(f"the parent sent {type(start).__name__} first: it must send Start")
    _check(start)
    logs.configure(start.node_of(start.rank), level, instance=start.instance, rank=start.rank)
    if start.lock:
        await hold(start.lock)
    core = StagePipeline(start, channel.emit)
    try:
        async with asyncio.TaskGroup() as group:
            lead = Rank0Driver(core, group) if start.rank == 0 else None
            _join_ring(core, lead, group)
            group.create_task(_load(core))
            while True:
                await _obey(await channel.receive(), core, lead)
    finally:
        await core.encoder.close()


def _check(start: Start) -> None:
    limits = (start.step_timeout_s, start.frame_timeout_s, start.prefill_chunk_tokens, start.max_requests)
    if not 0 <= start.rank < start.stages or not 0 <= start.epoch < 2**63 or min(limits) <= 0:
        raise BadControl(f"invalid Start: rank {start.rank} of {start.stages}, epoch {start.epoch}, {limits}")
    for secret in (start.successor_secret, start.predecessor_secret):
        remember_secret(secret.decode(errors="replace"))
        if start.stages > 1 and not secret:
            raise BadControl("Start lacks a secret: a ring of several stages needs one for each neighbour")


def _join_ring(core: StagePipeline, lead: Rank0Driver | None, group: asyncio.TaskGroup) -> None:
    """Listen and begin to connect; with one stage there is nobody to."""
    start = core.start
    if start.stages == 1:
        core.emit(Listening(port=0))
        return
    place = RingPlace(
        instance=start.instance,
        epoch=start.epoch,
        rank=start.rank,
        stages=start.stages,
        successor_secret=start.successor_secret,
        predecessor_secret=start.predecessor_secret,
    )
    follow = FollowerDriver(core)
    core.successor = Successor(
        place,
        core.ring,
        start.frame_timeout_s,
        core.link_up,
        lambda error: core.link_down(place.successor, error),
        start.node_of(place.successor),
        client_context(start.tls.authority) if start.tls else None,
    )
    core.predecessor = Predecessor(
        place,
        core.ring,
        start.frame_timeout_s,
        MAX_PAYLOAD_BYTES,
        core.link_up,
        lambda error: core.link_down(place.predecessor, error),
        follow.on_frame if lead is None else lead.on_frame,
        server_context(start.tls) if start.tls and start.is_encrypted else None,
    )
    try:
        listener = core.predecessor.listen(start.bind_host, start.ports)
    except Unavailable as error:
        raise LoadFailed(error.message) from error
    core.emit(Listening(port=listener.getsockname()[1]))
    group.create_task(core.predecessor.run(listener))
    group.create_task(core.successor.run())
    if lead is None:
        group.create_task(follow.sweep())


async def _load(core: StagePipeline) -> None:
    """Without a deadline: a large model on a slow disk takes minutes, and the parent watches."""
    rank, last = core.start.rank, core.start.stages - 1
    async with asyncio.TaskGroup() as group:
        tokenizer = group.create_task(core.encoder.load()) if rank in (0, last) else None
        loaded = await asyncio.wrap_future(core.thread.executor.submit(core.engine.load))
    if tokenizer is not None:
        # What the encoder has survived is safe to load here too.
        await asyncio.wrap_future(core.thread.executor.submit(core.engine.load_tokenizer, tokenizer.result()))
    if rank > 0:
        await core.encoder.close()
    core.emit(loaded)
    core.loaded.set()


async def _obey(message: object, core: StagePipeline, lead: Rank0Driver | None) -> None:
    match message:
        case StartRequest() if lead is not None:
            lead.generate(message.generate)
        case StartRequest():
            error = BadInput(f"rank {core.start.rank} does not take prompts: send Generate to rank 0")
            core.emit(RequestEvent(event=TokenEvent(request=message.generate.request, error=error.body())))
        case Cancel() if lead is not None:
            lead.cancel(message.request)
        case SetSuccessor() if core.successor is not None:
            core.successor.target(RingAddress(message.host, message.port, message.server_hostname))
        case GetStats():
            core.emit(await _stats(core))
        case Stop():
            raise _Stopped
        case Start():
            raise BadControl("the parent sent Start twice: spawn another stage instead")
        case _:
            log.debug("message ignored", type=type(message).__name__)


async def _stats(core: StagePipeline) -> StageStats:
    sessions, active_bytes, peak_bytes = await core.on_thread(core.engine.memory)
    return StageStats(
        requests=len(core.requests),
        sessions=sessions,
        active_bytes=active_bytes,
        peak_bytes=peak_bytes,
        unknown_frames=core.requests.unknown_frames,
        refused_connections=core.predecessor.refused if core.predecessor else 0,
        displaced=core.requests.displaced,
    )
