"""Pins, last uses and promises on the disk: they survive a restart, and no index is needed. Blocking: for threads.

    pins/<org>--<name>@<commit>   empty; its being there is the pin, durable before it is acknowledged
    uses/<org>--<name>@<commit>   empty; its mtime is the last use, written within 30 s of it and at a stop
    promises/<org>--<name>@<commit>   {"blobs":[…]}: what a fetch under way counts on, here already or not

The mtime of a promise is when its model was last known to be wanted; where the file could not be written, that of its
partials' `meta.json`.

A model without a file in `uses/` counts from when its manifest was written. Pins and uses of a model go with it; a
start removes those of models whose manifest is not there. A promise goes when its fetch ends; without it, a start
would take what that fetch has committed so far for garbage.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from shoal_common.errors import BadMessage, BadName, Failed
from shoal_common.layout import Layout, model_of
from shoal_common.logs import Log
from shoal_common.messages import Message, decode, encode
from shoal_storage.decide import Ledger
from shoal_storage.durable import make_directory, sync, write_file

log = Log("keeping")

WRITE_EVERY_S = 30.0
_US_PER_S = 1_000_000
_NS_PER_US = 1_000
_UNFINISHED = ".new"


class Promise(Message):
    """`promises/<org>--<name>@<commit>`."""

    blobs: list[str]


class Keeping:
    """Keeps `pinned`, `last_uses` and `promised` of a ledger and the files that remember them alike."""

    def __init__(self, layout: Layout, ledger: Ledger) -> None:
        self._layout, self._ledger = layout, ledger
        self._unwritten: set[str] = set()
        """Models whose last use is newer than their file. Only models that are here: bounded by them."""

    def read(self) -> None:
        """At start, after the ledger: what was kept of the models that are here."""
        lay, ledger = self._layout, self._ledger
        ledger.pinned = set(self._entries(lay.pins))
        ledger.last_uses.clear()
        for model in ledger.here:
            self.came_in(model)
        for model, path in self._entries(lay.uses).items():
            with suppress(FileNotFoundError):
                ledger.last_uses[model] = path.stat().st_mtime
        for model, path in named(lay.promises):
            if model in ledger.manifests:
                _remove(path)  # sealed, and all its blobs are its manifest's
                continue
            try:
                ledger.promised[model] = set(decode(path.read_bytes(), Promise).blobs)
                ledger.wanted_s[model] = path.stat().st_mtime
            except (BadMessage, OSError) as e:
                log.warning("not a promise; left alone", path=path, why=str(e))
        for model, part in ledger.parts.items():
            ledger.promised.setdefault(model, set()).update(part.manifest.blob_sizes)
        for blob, partial in ledger.partials.items():
            with suppress(FileNotFoundError):
                reserved_s = (lay.partial(blob) / "meta.json").stat().st_mtime
                for model in partial.models - ledger.promised.keys():
                    ledger.wanted_s[model] = max(reserved_s, ledger.wanted_s.get(model, 0.0))

    def _entries(self, directory: Path) -> dict[str, Path]:
        """The files of a directory by the models they are of. Those of models that are gone are removed."""
        found, here = {}, self._ledger.here
        for model, path in named(directory):
            repo, _, commit = model.rpartition("@")
            if model in here:
                found[model] = path
            elif not self._layout.manifest(repo, commit).exists():  # one that cannot be read now is not gone
                path.unlink(missing_ok=True)
        return found

    def came_in(self, model: str) -> None:
        """A model was sealed: until it is used, it counts from when its manifest was written."""
        if model not in self._unwritten:
            repo, _, commit = model.rpartition("@")
            lay = self._layout
            for path in (lay.use(repo, commit), lay.manifest(repo, commit), lay.part(repo, commit)):
                with suppress(FileNotFoundError):
                    self._ledger.last_uses[model] = path.stat().st_mtime
                    return

    def used(self, models: Iterable[str], now_s: float) -> None:
        """Note a use of those of the models that are here. In memory: `write_uses` makes it last."""
        here = self._ledger.here
        for model in models:
            if model in here:
                self._ledger.last_uses[model] = now_s
                self._unwritten.add(model)

    def write_uses(self) -> None:
        """Make the uses noted since the last time durable. What cannot be written is tried again the next time."""
        # Taken first, one by one: a use that is noted while its file is written is written again.
        for model in sorted(self._unwritten):
            self._unwritten.discard(model)
            last_use_s = self._ledger.last_uses.get(model)
            if last_use_s is None:  # it was removed meanwhile
                continue
            repo, _, commit = model.rpartition("@")
            try:
                _touch(self._layout.use(repo, commit), last_use_s)
            except OSError as e:
                self._unwritten.add(model)
                log.warning("a last use could not be written; kept in memory", model=model, why=e.strerror)

    def promise(self, model: str) -> None:
        """Make what the ledger has promised to a model's fetch survive a restart."""
        repo, _, commit = model.rpartition("@")
        path = self._layout.promise(repo, commit)
        try:
            make_directory(path.parent)
            write_file(path, encode(Promise(blobs=sorted(self._ledger.promised[model]))))
        except OSError as e:
            # A full disk; after a restart, what this fetch has brought would be brought again.
            log.warning("a promise is kept in memory only", model=model, why=e.strerror)

    def wanted(self, model: str, now_s: float) -> None:
        """A model on its way is wanted now. A restart remembers it where the disk lets it."""
        self._ledger.wanted_s[model] = now_s
        repo, _, commit = model.rpartition("@")
        partials = (self._layout.partial(b) for b, p in self._ledger.partials.items() if model in p.models)
        for path in (self._layout.promise(repo, commit), *(p / "meta.json" for p in partials)):
            with suppress(OSError):
                os.utime(path, (now_s, now_s))

    def end_promise(self, model: str) -> None:
        """A model's fetch is over, for better or worse."""
        self._ledger.promised.pop(model, None)
        self._ledger.wanted_s.pop(model, None)
        self._ledger.ended.discard(model)
        repo, _, commit = model.rpartition("@")
        _remove(self._layout.promise(repo, commit))

    def pin(self, model: str) -> None:
        """Keep a model. After this returns, its pin survives a power cut."""
        repo, _, commit = model.rpartition("@")
        try:
            _touch(self._layout.pin(repo, commit))
        except OSError as e:
            raise Failed(
                f"the pin of {model} could not be written to the disk ({e.strerror}); free some space and try again"
            ) from None
        self._ledger.pinned.add(model)

    def unpin(self, model: str) -> None:
        """Keep a model no longer. Not pinned already is fine."""
        repo, _, commit = model.rpartition("@")
        _remove(self._layout.pin(repo, commit))
        self._ledger.pinned.discard(model)

    def forget(self, model: str) -> None:
        """A model was removed: so is what was kept of it."""
        self._unwritten.discard(model)
        self._ledger.last_uses.pop(model, None)
        self.unpin(model)
        repo, _, commit = model.rpartition("@")
        self._layout.use(repo, commit).unlink(missing_ok=True)


def named(directory: Path) -> Iterator[tuple[str, Path]]:
    """The files of a directory that are called as a model is on the disk. Strange ones are left alone, and logged."""
    with suppress(FileNotFoundError):
        for path in sorted(directory.iterdir()):
            if path.name.startswith(".") and path.name.endswith(_UNFINISHED):
                path.unlink(missing_ok=True)
                continue
            name, _, commit = path.name.rpartition("@")
            try:
                model = model_of(name, commit)
            except BadName:
                log.warning("not a pin or a use of a model; left alone", path=path)
                continue
            yield model, path


def _touch(path: Path, mtime_s: float | None = None) -> None:
    """Make an empty file, or give it another time, durably."""
    make_directory(path.parent)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        if mtime_s is not None:
            ns = round(mtime_s * _US_PER_S) * _NS_PER_US  # a float of seconds holds microseconds and no more
            os.utime(fd, ns=(ns, ns))
        os.fsync(fd)
    finally:
        os.close(fd)
    sync(path.parent)


def _remove(path: Path) -> None:
    if path.exists():  # a read-only file system refuses to remove even what is not there
        path.unlink(missing_ok=True)
        sync(path.parent)
