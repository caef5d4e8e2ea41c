"""What every rank does with a request: a pass through the shard, the result onward, the end when a link breaks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from time import perf_counter
from typing import Any, TypeVar

import msgspec

from shoal_common.errors import ErrorBody, InternalError, ShoalError, StageLost
from shoal_common.logs import StructuredLogger
from shoal_common.messages.generation import TokenEvent
from shoal_inference.stage.compute.engine import Engine, Hidden, MlxThread, P, R
from shoal_inference.stage.encoder.messages import EncoderLimits
from shoal_inference.stage.encoder.process import PromptEncoder
from shoal_inference.stage.errors import ComputeStuck, LinkError
from shoal_inference.stage.ipc.messages import FromChild, Linked, Start, Unlinked
from shoal_inference.stage.requests.pass_timing import Passes
from shoal_inference.stage.requests.request_table import PassResult, RequestState, RequestTable
from shoal_inference.stage.ring.frames import Dtype, End, Flag, Frame, Kind, Open, make_frame, ring_tag
from shoal_inference.stage.ring.ring import Predecessor, Successor

T = TypeVar("T")
log = StructuredLogger("stage.pipeline")

_LOOKS = 10


async def in_time(computing: Coroutine[Any, Any, T], compute_s: float | None) -> T:
    """What is computed. Raises TimeoutError when it takes longer than `compute_s`.

    Time in which this process was stopped, or its machine slept, is not computing: it counts as one look at most.
    """
    if compute_s is None:
        return await computing
    work = asyncio.ensure_future(computing)
    try:
        for _ in range(_LOOKS):
            if (await asyncio.wait({work}, timeout=compute_s / _LOOKS))[0]:
                return work.result()
        raise TimeoutError
    finally:
        work.cancel()


class StagePipeline:
    """One stage's parts, and the steps that lead (rank 0) and follow (the others) share."""

    def __init__(self, start: Start, emit: Callable[[FromChild], None]) -> None:
        self.start = start
        self.emit = emit
        self.ring = ring_tag(start.instance, start.epoch)
        self.engine = Engine(start)
        self.thread = MlxThread()
        self.encoder = PromptEncoder(start.model_dir, EncoderLimits(cpu_s=start.encode_cpu_s))
        self.requests = RequestTable(self.engine, self.thread, emit)
        self.loaded = asyncio.Event()
        self.successor: Successor | None = None
        """None with a single stage."""
        self.predecessor: Predecessor | None = None
        self._linked = False
        self._passes = Passes()

    @property
    def is_last(self) -> bool:
        """Whether this rank samples."""
        return self.start.rank == self.start.stages - 1

    @property
    def can_serve(self) -> bool:
        """Whether both neighbours are connected, or there are none."""
        if self.successor is None or self.predecessor is None:
            return self.start.stages == 1
        return self.successor.is_up and self.predecessor.is_up

    async def on_thread(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run on the MLX thread once loaded; anything it raises that is not ours becomes InternalError."""
        await self.loaded.wait()
        future = self.thread.executor.submit(function, *args, **kwargs)
        try:
            return await asyncio.wrap_future(future)
        except (ShoalError, asyncio.CancelledError):
            raise
        except BaseException as error:  # a request is owed its end, whatever MLX raised; a Rust panic is no Exception
            log.error("computing failed", exc=error)
            raise InternalError(
                f"rank {self.start.rank} could not compute: {type(error).__name__}: {error}"
            ) from error

    async def step(
        self, entry: RequestState, given: Sequence[int] | Hidden, sample: bool, *, compute_s: float | None = None
    ) -> None:
        """One pass of a request through the own layers, and its result onward.

        `compute_s` is the deadline of the pass alone, given where nothing else can be queued before it.
        """
        entry.next_seq += 1
        seq = entry.next_seq
        try:
            computing = self.on_thread(self._computed, entry.key, given, sample)
            result, took_s = await in_time(computing, compute_s)
        except TimeoutError as error:
            raise ComputeStuck(
                f"rank {self.start.rank} has computed one pass for over {compute_s} s and cannot be interrupted: "
                "the stage must be restarted"
            ) from error
        self._note(given, sample, took_s)
        if self.requests.get(entry.key) is not entry:
            return  # ended meanwhile: cancelled, or a link broke
        entry.touched_s = asyncio.get_running_loop().time()
        if isinstance(result, Hidden):
            await self._hand_on(entry, seq, result, sample)
        else:
            self._answer(entry, seq, result)

    def _computed(
        self, session: bytes, given: Sequence[int] | Hidden, sample: bool
    ) -> tuple[Hidden | TokenEvent | None, float]:
        """A pass, and the seconds it took once it had its turn."""
        begun_s = perf_counter()
        result = self.engine.run(session, given, sample)
        return result, perf_counter() - begun_s

    def _note(self, given: Sequence[int] | Hidden, sample: bool, took_s: float) -> None:
        tokens = given.shape[0] * given.shape[1] if isinstance(given, Hidden) else len(given)
        told = self._passes.note(took_s, asyncio.get_running_loop().time()) if sample and tokens == 1 else None
        if told is not None:
            self.emit(told)

    async def _hand_on(self, entry: RequestState, seq: int, hidden: Hidden, sample: bool) -> None:
        flags = Flag.SAMPLE if sample else Flag.NONE
        frame = make_frame(
            Kind.HIDDEN,
            self.ring,
            entry.key,
            seq=seq,
            flags=flags,
            dtype=hidden.dtype,
            shape=hidden.shape,
            payload=hidden.data,
        )
        try:
            if self.successor is not None:
                await self.successor.send(frame)
        except LinkError as error:
            raise self.stage_lost((self.start.rank + 1) % self.start.stages, error) from error

    def _answer(self, entry: RequestState, seq: int, event: TokenEvent | None) -> None:
        """Last rank: the token to the parent, and word of it to rank 0."""
        token = None if event is None else event.token
        finished = event is not None and event.finish_reason is not None
        if event is not None:
            self.requests.say(entry, event)
        if self.successor is None:
            entry.answers.put_nowait(PassResult(seq, token, finished))
            return
        if token is None:
            frame = make_frame(Kind.TOKEN, self.ring, entry.key, seq=seq)
        else:
            frame = make_frame(
                Kind.TOKEN,
                self.ring,
                entry.key,
                seq=seq,
                flags=Flag.FINISHED if finished else Flag.NONE,
                dtype=Dtype.I32,
                shape=(1, 1, 1),
                payload=token.to_bytes(4, "little"),
            )
        self.send_control(frame)
        if finished:
            self.requests.end(entry)

    def open_frame(self, entry: RequestState, ask: Open) -> Frame:
        """What makes the next stage know a request."""
        return make_frame(Kind.OPEN, self.ring, entry.key, meta=msgspec.json.encode(ask))

    def send_control(self, frame: Frame) -> None:
        """A small frame to the next stage. Without a link there is nobody to tell: its loss ends the requests."""
        try:
            if self.successor is not None:
                self.successor.post(frame)
        except LinkError as error:
            log.debug("frame not sent", kind=frame.header.kind.name, reason=error.message)

    def fail_request(self, entry: RequestState, error: ShoalError) -> None:
        """End a request here with an error, and let the other stages free what they hold for it."""
        if self.requests.get(entry.key) is not entry:
            return
        meta: End | ErrorBody = End(reason=error.code) if self.start.rank == 0 else error.body()
        known_onward = entry.opened or self.start.rank > 0
        self.requests.fail(entry, error)
        if known_onward:
            kind = Kind.END if isinstance(meta, End) else Kind.FAIL
            self.send_control(make_frame(kind, self.ring, entry.key, meta=msgspec.json.encode(meta)))

    def link_up(self) -> None:
        """A link was authenticated: `Linked` once both are."""
        if self.can_serve and not self._linked:
            self._linked = True
            self.emit(Linked())

    def link_down(self, rank: int, error: LinkError) -> None:
        """A link broke: every request in flight needed it, for its passes go all the way round."""
        log.warning(
            "connection to a neighbour lost",
            peer_rank=rank,
            peer_node=self.start.node_of(rank),
            requests=len(self.requests),
            reason=error.message,
        )
        for entry in self.requests:
            self.fail_request(entry, self.stage_lost(rank, error))
        if self._linked:
            self._linked = False
            self.emit(Unlinked(reason=error.message, rank=rank))

    def stage_lost(self, rank: int, error: LinkError) -> StageLost:
        return StageLost(
            f"rank {self.start.rank} of instance {self.start.instance} lost rank {rank} ({error.message}): "
            "ask again in a moment"
        )
