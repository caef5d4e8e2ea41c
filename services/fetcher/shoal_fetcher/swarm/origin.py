"""The origin: the one node that reads a blob where nobody says what its leaves hash to, and tells the others.

That is the hub, or a node that has it whole without a leaf list (a read-only root, an older version). It reads in
order what no living node has; all it has, also what came from the others, it hashes in order by sha256. When that is
the blob's name, the list is sealed.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress

from shoal_common.buckets import origin_key
from shoal_common.errors import Corrupt, Failed, ShoalError, Unavailable
from shoal_common.layout import LEAF_BYTES
from shoal_common.leases import Lease, acquire, holding
from shoal_common.leaves import root_of
from shoal_common.logs import Log
from shoal_common.runs import run, runs_of
from shoal_fetcher.cut import Cutter
from shoal_fetcher.decide import EARLIER, HUB, FromPeer, choose
from shoal_fetcher.errors import RateLimited, WrongWhole
from shoal_fetcher.http_range import Body, was_silent
from shoal_fetcher.partial import PartialBlob, to_its_end
from shoal_fetcher.swarm.haves import Haves
from shoal_fetcher.swarm.lists import Lists
from shoal_fetcher.swarm.peers import Peers
from shoal_fetcher.swarm.shared import Fetch

log = Log("origin")

Reader = Callable[[int, int], AbstractAsyncContextManager[Body]]
"""Opens a source at bytes [start, end)."""
Paced = Callable[[int], Awaitable[None]]
"""Returns when so many bytes may pass."""
_HASHED_AT_ONCE = 16
_RUN_LEAVES = 16
_LEASE_AGAIN_S = 0.5
_LOOK_AGAIN_S = 1.0
_CUT_AT_LEAVES = 64
"""When so many leaves that are still to come have turned up elsewhere, the reading starts anew behind them."""


class Contradiction(Corrupt):
    """The source says otherwise than somebody in the cluster whose word was taken."""


async def read_missing(
    partial: PartialBlob,
    name: str,
    source: str,
    read: Reader,
    missing: Callable[[], int],
    got: Callable[[int], None],
    came: Callable[[int], Awaitable[None]],
    sealed: Callable[[], bool],
) -> None:
    """Read what `missing()` says now, in order, until it says nothing.

    `came(bytes)` may wait; `got(leaf)` is told of each leaf. Raises Corrupt, Contradiction, and what `read` raises.
    """
    while todo := missing():
        first, end = next(runs_of(todo))
        last = min(end * LEAF_BYTES, partial.size_bytes)
        cutter = Cutter(partial.size_bytes)
        async with read(first * LEAF_BYTES, last) as body:
            cutter.begin_at(body.begin)
            async for chunk in body.chunks:
                await came(len(chunk))
                for leaf, data in cutter.feed(chunk):
                    if partial.here >> leaf & 1:
                        continue  # a source that ignores ranges has sent it before
                    if await partial.write(leaf, data, vouch=True):
                        got(leaf)
                    elif sealed():
                        raise Corrupt(f"{source} gives other bytes for {name} than it should")
                    else:
                        raise Contradiction(f"{source} gives other bytes for {name} than a node had said")
                if cutter.overflowing:
                    raise Corrupt(f"{source} sends more bytes for {name} than it has")
                if (run(cutter.leaf, end) & ~missing()).bit_count() >= _CUT_AT_LEAVES:
                    break
            else:
                if cutter.leaf < end and run(cutter.leaf, end) & missing():
                    raise Unavailable(f"{source} ended early: leaves of {name} are missing")


def from_hub(read: Reader, paced: Paced) -> Reader:
    """The hub, at its pace."""

    @asynccontextmanager
    async def reading(start: int, end: int) -> AsyncIterator[Body]:
        async with read(start, end) as body:

            async def chunks() -> AsyncIterator[bytes]:
                async for chunk in body.chunks:
                    await paced(len(chunk))
                    yield chunk

            yield Body(body.begin, chunks())

    return reading


def from_node(peers: Peers, node: str, blob: str, size_bytes: int, paced: Paced) -> Reader:
    """A node that has the blob whole and no list of it. What it sends is nobody's word but its own."""

    @asynccontextmanager
    async def reading(start: int, end: int) -> AsyncIterator[Body]:
        async def chunks() -> AsyncIterator[bytes]:
            first, last = start // LEAF_BYTES, -(-end // LEAF_BYTES)
            while first < last:
                upto = min(first + _RUN_LEAVES, last)
                came: asyncio.Queue[bytes] = asyncio.Queue()

                def took(
                    leaf: int, data: memoryview, done: Callable[[], None], into: asyncio.Queue[bytes] = came
                ) -> None:
                    into.put_nowait(bytes(data))
                    done()

                asking = asyncio.ensure_future(peers.leaves(node, blob, size_bytes, first, upto, took))
                try:
                    for _ in range(first, upto):
                        getting = asyncio.ensure_future(came.get())
                        try:
                            await asyncio.wait({asking, getting}, return_when=asyncio.FIRST_COMPLETED)
                            if asking.done():
                                asking.result()  # raises why it ended early
                            data = await getting
                        finally:
                            getting.cancel()
                        await paced(len(data))
                        yield data
                    await asking
                finally:
                    asking.cancel()
                    await asyncio.wait({asking})
                first = upto

        yield Body(start, chunks())

    return reading


async def sha256_of(partial: PartialBlob, more: Callable[[], Awaitable[None]]) -> str:
    """The sha256 of all leaves, hashed in order as they become ready; `more` returns when that may be so."""
    digest, at = hashlib.sha256(), 0

    def take(first: int, end: int) -> None:
        for leaf in range(first, end):
            digest.update(partial.read(leaf))

    while at < partial.leaf_count:
        here = partial.ready >> at
        count = min((~here & (here + 1)).bit_length() - 1, _HASHED_AT_ONCE)
        if count == 0:
            await more()
            continue
        await to_its_end(take, at, at + count)
        at += count
    return digest.hexdigest()


class Origin:
    """The part of the origin, when this node plays it. `look` takes it up; `held` keeps the lease, once it has it."""

    def __init__(self, fetch: Fetch, haves: Haves, lists: Lists, elsewhere: Callable[[], int]) -> None:
        self._fetch, self._haves, self._lists, self._elsewhere = fetch, haves, lists, elsewhere
        self.held = AsyncExitStack()
        self.failed: ShoalError | None = None
        """What ends the attempt."""
        self._task: asyncio.Task[None] | None = None
        self._not_before_s = self._asked_until_s = 0.0
        self._pulse = asyncio.Event()

    def asked_to_wait(self, now_s: float) -> bool:
        """Whether it waits because the hub wants it to."""
        return now_s <= self._asked_until_s

    def moved(self) -> None:
        """Leaves have become ready, or somebody has others."""
        self._pulse.set()
        self._pulse = asyncio.Event()

    async def _next(self) -> None:
        await self._pulse.wait()

    def look(self, now_s: float) -> None:
        """Become the origin if one is needed and there is none."""
        fetch = self._fetch
        if self._task is not None or now_s < self._not_before_s or not self._is_needed():
            return
        if fetch.shared.around.origin(fetch.blob) in (None, fetch.shared.node):
            self._task = asyncio.create_task(self._play())
            self._task.add_done_callback(self._ended)

    def _is_needed(self) -> bool:
        fetch = self._fetch
        if fetch.returning():
            return False
        if self._lists.proven:
            return bool(fetch.missing() & ~self._elsewhere())
        if fetch.holders() and self._lists.root() and not self._lists.lacking:
            return False  # they have the list
        return bool(fetch.missing()) or fetch.wanted == fetch.partial.all

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failed = error if isinstance(error, ShoalError) else Failed(f"an origin ended: {error!r}")
        self._fetch.changed()

    async def _play(self) -> None:
        fetch, shared = self._fetch, self._fetch.shared
        source: str | None = None
        kept = False
        try:
            lease = await acquire(shared.buckets.lease, origin_key(fetch.blob), shared.node, shared.uid)
            if lease is None:
                self._not_before_s = asyncio.get_running_loop().time() + _LEASE_AGAIN_S
                return
            await self.held.enter_async_context(holding(lease))
            # The last origin may have finished between our look and our taking the lease (I9).
            await shared.around.catch_up()
            if not self._is_needed():
                return
            choice = choose(fetch.blob, fetch.holders(), None, shared.node, fetch.setbacks, shared.busy)
            source = choice.node if isinstance(choice, FromPeer) else None
            self._haves.origin = True
            await self._while_held(lease, source)
            kept = True
        except asyncio.CancelledError:
            kept = True  # all is here, or the attempt ends: the lease goes back with `held`, after the commit
            raise
        except WrongWhole:
            raise
        except Contradiction as e:
            raise WrongWhole(e.message) from e
        except ShoalError as e:
            # Raises what trying again cannot help.
            delay_s = fetch.setbacks.after(e, source, hopes=fetch.has_hopes() or bool(self._elsewhere()))
            log.warning("a source failed", path=fetch.file.path, source=source or HUB, why=e.message, wait_s=delay_s)
            if was_silent(e):
                fetch.progress.left(source or HUB)
            fetch.progress.note(e.message)
            self._not_before_s = asyncio.get_running_loop().time() + delay_s
            if isinstance(e, RateLimited):
                self._asked_until_s = self._not_before_s
        finally:
            if not kept:
                self._haves.origin = False
                await self.held.aclose()

    async def _while_held(self, lease: Lease, source: str | None) -> None:
        tasks = {asyncio.ensure_future(w) for w in (self._read_and_seal(source), lease.wait_lost())}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if lease.held:
                for task in tasks:
                    if task.done():
                        task.result()
            else:
                path = self._fetch.file.path
                raise Unavailable(f"the origin lease of {path} was lost; its leaves are kept")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _read_and_seal(self, source: str | None) -> None:
        fetch, partial = self._fetch, self._fetch.partial
        if partial.here:
            fetch.setbacks.givers.add(EARLIER)
        if told := await partial.vouch_for_held():
            self._haves.tell_hashes(told)
        self.moved()
        seals = fetch.wanted == partial.all and not self._lists.proven
        sealing = asyncio.ensure_future(sha256_of(partial, self._next)) if seals else None
        try:
            await self._read(source)
            if sealing is None:
                return
            found = await sealing
        finally:
            if sealing is not None:
                sealing.cancel()
                await asyncio.wait({sealing})
        if found != fetch.blob:
            raise WrongWhole(f"{fetch.file.path} hashes to {found[:16]}…", expected=fetch.blob, found=found)
        self._lists.seal(root_of(partial.hashes))

    async def _read(self, source: str | None) -> None:
        """Until nothing is missing, from anywhere."""
        fetch, shared = self._fetch, self._fetch.shared
        giver = source or HUB

        def missing() -> int:
            return fetch.missing() & ~self._elsewhere()

        def got(leaf: int) -> None:
            fetch.setbacks.givers.add(giver)
            self._haves.tell_hashes(1 << leaf)
            self.moved()
            fetch.changed()

        async def came(count: int) -> None:
            fetch.progress.received(giver, count)

        def read(start: int, end: int) -> AbstractAsyncContextManager[Body]:
            return shared.hub.read(fetch.manifest, fetch.file, start, end)

        if source is None:
            reader, name = from_hub(read, fetch.progress.pacing(shared.limits.hub)), "the hub"
        else:
            paced = fetch.progress.pacing(shared.limits.peer(source))
            reader = from_node(shared.peers, source, fetch.blob, fetch.file.size_bytes, paced)
            name = f"node {source}"
            shared.busy[source] += 1
        try:
            while fetch.missing():
                pulse = self._pulse
                fetch.progress.note("") if missing() else None
                await read_missing(
                    fetch.partial, fetch.file.path, name, reader, missing, got, came, lambda: bool(self._lists.proven)
                )
                if fetch.missing():
                    with suppress(TimeoutError):
                        async with asyncio.timeout(_LOOK_AGAIN_S):
                            await pulse.wait()
        finally:
            if source is not None:
                shared.busy[source] -= 1

    async def close(self) -> None:
        """Stop what is under way. The lease stays as long as `held` is open."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
