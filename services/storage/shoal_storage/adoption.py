"""Models of read-only roots come and go: looked at by stat every few minutes, hashed once, offered as they are.

What is in the roots is decided in `adopt.py`, read in `roots.py`; what the store holds of it is `links.py`'s.
Nothing is ever written in a root. Hashing goes on outside the critical section, one file at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import msgspec
from msgspec import structs

from shoal_common.errors import ShoalError
from shoal_common.logs import Log
from shoal_common.messages.records import RootState
from shoal_common.service import Context
from shoal_storage import links
from shoal_storage.adopt import Candidate, Recognised, Verdict, Verified, decide, is_verified, recognise
from shoal_storage.adopted import Adopted, File
from shoal_storage.announce import Announcer
from shoal_storage.decide import Ledger
from shoal_storage.disk import Disk
from shoal_storage.doubt import weigh
from shoal_storage.quarantine import Checked
from shoal_storage.roots import Unlistable, hash_file, list_root, real_root

log = Log("adoption")

LOOK_EVERY_S = 300.0
_FIRST_LOOK_S = 10.0
"""How long a start waits for the roots: one that does not answer is no reason not to start."""
_LOOK_DEADLINE_S = 300.0
_WRITE_EVERY_S = 5.0
_TOLD_AT_MOST = 20


class _Look(msgspec.Struct):
    """What a look at a root has found. `real` is where the root is, links followed."""

    real: str
    found: Recognised = msgspec.field(default_factory=Recognised)
    error: str = ""


class _GivenUp(Exception):
    """Ends a hash in its thread: nobody asks for that file any more."""


class Adoption:
    """Keeps `adopted` of a ledger, and what the store holds of it, as the roots are."""

    def __init__(
        self,
        context: Context,
        disk: Disk,
        ledger: Ledger,
        section: asyncio.Lock,
        announcer: Announcer,
        roots: Iterable[str],
    ) -> None:
        self._context, self._disk, self._ledger = context, disk, ledger
        self._section, self._announcer, self._roots = section, announcer, tuple(roots)
        self._layout = disk.layout
        self._looks: dict[str, _Look] = {}
        self._looking: dict[str, asyncio.Task[_Look]] = {}
        self._verified: dict[str, Verified] = {}
        self._verdict = Verdict()
        self._unable: dict[str, str] = {}
        """Directories whose files could not be hashed, or noted, and why; tried again after the next look."""
        self._wanted: frozenset[str] = frozenset()
        self._noted: set[str] = set()
        """Models with a view into a root, left by an earlier life of this process."""
        self._pointed: dict[str, File] = {}
        self._unwritten, self._written_s = False, 0.0
        self._told: set[str] | None = None
        self._started = False
        self._one_look, self._one_settling = asyncio.Lock(), asyncio.Lock()
        self._look_now, self._hash_now = asyncio.Event(), asyncio.Event()

    # From outside

    async def start(self) -> asyncio.Task[None]:
        """Adopt what was hashed before and still stands, before anything is announced. Returns the first look.

        It goes on in the background when a root does not answer.
        """
        self._verified = await asyncio.to_thread(links.read_verified, self._layout)
        self._noted = set(await asyncio.to_thread(links.noted, self._layout))
        look = asyncio.create_task(self._look_again())
        done, _ = await asyncio.wait({look}, timeout=_FIRST_LOOK_S)
        if not done:
            log.warning("the read-only roots do not answer yet; going on without them")
        self._started = True
        return look

    async def use_roots(self, roots: Iterable[str]) -> None:
        """From now on these are the roots: models of others are taken back before this returns."""
        self._look_now.set()
        if tuple(roots) == self._roots:
            return
        self._roots = tuple(roots)
        self._looks = {root: look for root, look in self._looks.items() if root in self._roots}
        await self._settle()

    async def refresh(self) -> None:
        """Look at all roots now, by listing and stat. What is new there is hashed afterwards, in the background."""
        async with self._one_look:
            looks = await asyncio.gather(*(self._look(root) for root in self._roots))
            found = {root: look for root, look in zip(self._roots, looks, strict=False) if root in self._roots}
            self._looks = found
            self._unable.clear()
            self._forget_useless()
            await self._settle()

    async def doubted(self, sha256: str, checked: Checked | None) -> list[str]:
        """An adopted blob hashed to something else, or its file has gone. Returns the models that this breaks."""
        before = set(self._ledger.whole)
        file = self._ledger.adopted_blobs.get(sha256)
        known = self._verified.get(file.at) if file else None
        if file and known and checked and checked.mtime_ns == file.seen.mtime_ns and known.seen == file.seen:
            self._verified[file.at] = structs.replace(known, rotten=True)
            self._unwritten = True
            await self._write(now=True)
            await self._settle()
        else:
            await self.refresh()
        return sorted(before - self._ledger.whole.keys())

    async def remember(self) -> None:
        """At a stop: what was hashed is not hashed again."""
        await self._write(now=True)

    # Around

    async def look_regularly(self) -> None:
        """Endlessly: see what has come, changed or gone."""
        while True:
            try:
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._look_now.wait()
            except TimeoutError:
                pass
            self._look_now.clear()
            await self._look_again()

    async def _look_again(self) -> None:
        try:
            await self.refresh()
        except (OSError, ShoalError) as e:
            log.warning("the read-only roots could not be looked at", why=str(e))

    async def hash_what_waits(self) -> None:
        """Endlessly: hash what nobody has hashed yet, the smallest model first."""
        while True:
            self._hash_now.clear()
            while waiting := [c for c in self._verdict.waiting if c.directory not in self._unable]:
                try:
                    await self._hash(min(waiting, key=lambda c: (self._left_bytes(c), c.directory)))
                    await self._settle()
                except (OSError, ShoalError) as e:
                    log.warning("a model of a read-only root could not be adopted", why=str(e))
                    break
            await self._hash_now.wait()

    # Looking

    async def _look(self, root: str) -> _Look:
        # One look at a root at a time: a file system that hangs takes one thread, not one each time.
        task = self._looking.get(root)
        if task is None:
            task = self._looking[root] = asyncio.create_task(asyncio.to_thread(self._read, root))
            task.add_done_callback(lambda _: self._looking.pop(root, None))
        done, _ = await asyncio.wait({task}, timeout=_LOOK_DEADLINE_S)
        look = task.result() if done else _Look(root, error="it does not answer")
        before = self._looks.get(root)
        if look.error and (before is None or before.error != look.error):
            log.warning("a read-only root cannot be looked at", root=root, why=look.error)
        for directory, why in look.found.refused.items():
            if before is None or directory not in before.found.refused:
                log.warning("not adopted", directory=directory, why=why)
        return look

    def _read(self, root: str) -> _Look:
        real = str(real_root(root))
        try:
            return _Look(real, recognise(list_root(root, self._disk.keep_on)))
        except Unlistable as e:
            return _Look(real, error=str(e))

    def _forget_useless(self) -> None:
        """Drop what is known of files that are in no root any more; of a root that is away all is kept."""
        here = {f.at for look in self._looks.values() for c in look.found.candidates for f in c.files}
        away = tuple(f"{look.real}/" for look in self._looks.values() if look.error)
        kept = {at: v for at, v in self._verified.items() if at in here or at.startswith(away)}
        self._unwritten |= len(kept) < len(self._verified)
        self._verified = kept

    # Hashing

    def _left_bytes(self, candidate: Candidate) -> int:
        return sum(f.seen.size_bytes for f in candidate.files if not is_verified(f, self._verified))

    async def _hash(self, candidate: Candidate) -> None:
        done = done_bytes = 0
        for file in candidate.files:
            if is_verified(file, self._verified):
                continue
            if file.at not in self._wanted:
                return

            def between(at: str = file.at) -> None:
                self._disk.keep_on()
                if at not in self._wanted:
                    raise _GivenUp

            try:
                found = await asyncio.to_thread(hash_file, file, between)
            except _GivenUp:
                return
            except OSError as e:
                self._unable[candidate.directory] = f"{file.path} cannot be read: {e.strerror}"
                log.warning("not adopted", directory=candidate.directory, why=self._unable[candidate.directory])
                return
            if found is None:
                self._unable[candidate.directory] = f"{file.path} changes while it is read"
                return
            self._verified[file.at] = Verified(seen=file.seen, sha256=found.sha256, git_sha1=found.git_sha1)
            self._unwritten = True
            done, done_bytes = done + 1, done_bytes + found.size_bytes
            await self._write()
        log.info("hashed a model of a read-only root", directory=candidate.directory, files=done, bytes=done_bytes)

    async def _write(self, now: bool = False) -> None:
        now_s = asyncio.get_running_loop().time()
        if self._unwritten and (now or now_s - self._written_s >= _WRITE_EVERY_S):
            self._unwritten, self._written_s = False, now_s
            await asyncio.to_thread(links.write_verified, self._layout, dict(self._verified))

    # Adopting

    async def _settle(self) -> None:
        """Make ledger, store and cluster agree with what was found and hashed so far."""
        async with self._one_settling:
            candidates = [
                c for root in self._roots if root in self._looks for c in self._looks[root].found.candidates
            ]
            self._verdict = verdict = await asyncio.to_thread(decide, candidates, dict(self._verified))
            self._wanted = frozenset(f.at for c in verdict.waiting for f in c.files)
            # Before it is announced: a kill afterwards costs no second hashing.
            await self._write(now=not verdict.waiting)
            async with self._section:
                await self._apply(verdict.adopted)
            await self._say_corrupt(verdict)
            self._announcer.roots = self._states()
            if self._started:  # before that, what follows a start says it: once is enough
                await self._announcer.publish()
        self._hash_now.set()

    async def _apply(self, wanted: dict[str, Adopted]) -> None:
        """Within the critical section: take back what went, take in what came, and weigh the store's own models."""
        ledger = self._ledger
        kept = {m: a for m, a in ledger.adopted.items() if wanted.get(m) == a}
        gone = [m for m in {**ledger.adopted, **dict.fromkeys(self._noted)} if m not in wanted]
        self._noted.clear()
        ledger.adopt(kept)
        for model in gone:
            await self._let_go(model)
        await self._take_in({m: a for m, a in wanted.items() if m not in kept})
        broken, whole = weigh(ledger)
        for model in broken:
            await self._announcer.take_back(model)
            log.warning("a model counted on a read-only root and is not whole any more; pull it again", model=model)
        for model, manifest in list(ledger.manifests.items()):
            if all(blob in ledger.blobs for blob in manifest.blob_sizes):
                continue
            try:
                # What it counts on may be in another file by now.
                await asyncio.to_thread(self._disk.build_view, manifest)
                if model in whole:
                    await self._announcer.announce(manifest)
                    log.info("a model is whole again, with files of a read-only root", model=model)
            except OSError as e:
                log.warning("a model that counts on a read-only root cannot be opened", model=model, why=str(e))

    async def _let_go(self, model: str) -> None:
        in_store = model in self._ledger.on_disk
        if not in_store:
            await self._announcer.take_back(model)
        await asyncio.to_thread(links.hide, self._layout, model, not in_store)
        log.warning("a model of a read-only root is not there any more, or not as it was", model=model)
        await self._context.events.tell("adoption_ended", model=model)

    async def _take_in(self, new: dict[str, Adopted]) -> None:
        """Adopt these too, those aside of which the store cannot take a note: its disk may be full."""
        before = self._ledger.adopted
        self._ledger.adopt({**before, **new})
        failed: dict[str, OSError] = {}
        try:
            await self._point()
        except OSError as e:
            failed = dict.fromkeys(new, e)
            log.warning("where adopted blobs are could not be written down", why=str(e))
        for model in new.keys() - failed.keys():
            adopted = new[model]
            try:
                news = await asyncio.to_thread(links.note, self._layout, model)
                if model in self._ledger.offered:
                    await asyncio.to_thread(links.show, self._layout, adopted)
                    await self._announcer.announce(adopted.manifest)
            except OSError as e:
                failed[model] = e
                continue
            if news:
                log.info("adopted", model=model, directory=adopted.directory)
                await self._context.events.tell("adopted", model=model, directory=adopted.directory)
        for model, why in failed.items():
            self._unable[new[model].directory] = f"the store cannot take a note of it: {why.strerror}"
            log.warning("not adopted", directory=new[model].directory, why=why.strerror)
        if failed:
            self._ledger.adopt({m: a for m, a in self._ledger.adopted.items() if m not in failed})

    async def _point(self) -> None:
        """Say of every adopted blob where it is, and of no other."""
        blobs = dict(self._ledger.adopted_blobs)
        if blobs != self._pointed or not blobs:
            changed = {sha256: f for sha256, f in blobs.items() if self._pointed.get(sha256) != f}
            await asyncio.to_thread(links.point, self._layout, changed, blobs)
            self._pointed = blobs

    # Telling

    async def _say_corrupt(self, verdict: Verdict) -> None:
        """Each corrupt file once; those known from before a start are in the state and the log only."""
        for at, directory in verdict.corrupt.items():
            if self._told is None or at not in self._told:
                log.warning("a file of a read-only root is corrupt; its model is not offered", path=at)
                if self._told is not None:
                    await self._context.events.tell("adopted_corrupt", path=at, directory=directory)
        self._told = set(verdict.corrupt)

    def _states(self) -> list[RootState]:
        return [self._state(root) for root in self._roots]

    def _state(self, root: str) -> RootState:
        look = self._looks.get(root)
        if look is None or look.error:
            return RootState(path=root, error=look.error if look else "it has not been looked at yet")
        of = {c.directory for c in look.found.candidates}
        waiting = [c for c in self._verdict.waiting if c.directory in of]
        refused = dict(look.found.refused)
        refused |= {d: why for d, why in (self._verdict.refused | self._unable).items() if d in of}
        return RootState(
            path=root,
            model_count=sum(a.directory in of for a in self._ledger.adopted.values()),
            waiting_count=len(waiting),
            waiting_bytes=sum(map(self._left_bytes, waiting)),
            not_adopted=dict(sorted(refused.items())[:_TOLD_AT_MOST]),
            not_adopted_count=len(refused),
        )
