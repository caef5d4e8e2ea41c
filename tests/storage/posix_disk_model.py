"""A disk as strict as POSIX allows: each name that was not made durable may be lost or kept independently.

A directory records every state since its last fsync: after a power cut each name is as in any of them. A file's bytes
are certain only after its fsync. Given the calls of a life, it reports which acknowledgements break.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath

from shoal_storage.files.volume_paths import VolumePaths
from tests.storage.crash_child_model import COMES, LEAVES, STAYS
from tests.storage.store_fixtures import Model
from tests.storage.syscall_tracer import Call

MODELS: dict[str, Model] = {m.name: m for m in (STAYS, LEAVES, COMES)}


class File:
    """A file; `dirty` if some of its bytes may be lost."""

    def __init__(self) -> None:
        self.dirty = True


class Directory:
    """A directory, and every state of its names that a power cut may leave."""

    def __init__(self) -> None:
        self.states: list[dict[str, Node]] = [{}]

    @property
    def now(self) -> dict[str, Node]:
        """Its names as a running process sees them."""
        return self.states[-1]

    def change(self, name: str, node: Node | None) -> None:
        """Create, replace or delete a name."""
        names = {k: v for k, v in self.now.items() if k != name}
        self.states.append(names if node is None else {**names, name: node})


Node = File | Directory


class StrictDisk:
    """Load the tree below an existing directory."""

    def __init__(self, root: str) -> None:
        self._base, self._root = PurePath(root), Directory()

    def make(self, call: Call) -> None:
        """Apply a call."""
        if call.name == "fsync":
            node = self._at(call.paths[0])
            if isinstance(node, File):
                node.dirty = False
            elif node is not None:
                node.states = [node.now]
        elif call.name in ("create", "write"):
            directory, name = self._parent(call.paths[0])
            there = directory.now.get(name)
            if isinstance(there, File):
                # Opened for writing, as `data` is, by the fetcher, which is not intercepted, until it is a blob.
                there.dirty = True
            else:
                directory.change(name, File())
        elif call.name == "symlink":
            directory, name = self._parent(call.paths[1])
            link = File()
            link.dirty = False  # its name is all that matters
            directory.change(name, link)
        elif call.name == "mkdir":
            directory, name = self._parent(call.paths[0])
            directory.change(name, Directory())
        elif call.name in ("unlink", "rmdir"):
            directory, name = self._parent(call.paths[0])
            directory.change(name, None)
        elif call.name in ("rename", "replace", "link"):
            source, target = call.paths
            node = self._at(source)
            directory, name = self._parent(target)
            directory.change(name, node)
            if call.name != "link":
                directory, name = self._parent(source)
                directory.change(name, None)

    def _parent(self, path: str) -> tuple[Directory, str]:
        found = self._at(str(PurePath(path).parent))
        assert isinstance(found, Directory), path
        return found, PurePath(path).name

    def _at(self, path: str) -> Node | None:
        node: Node | None = self._root
        for part in PurePath(path).relative_to(self._base).parts:
            node = node.now.get(part) if isinstance(node, Directory) else None
        return node

    def may_be(self, path: PurePath) -> list[Node]:
        """All entries that may be found at a path after a power cut."""
        found: set[Node] = {self._root}
        for part in path.relative_to(self._base).parts:
            found = {s[part] for d in found if isinstance(d, Directory) for s in d.states if part in s}
        return list(found)

    def remembers(self, directory: PurePath) -> bool:
        """Whether something is in a directory after a power cut, under any name."""
        return self.certain(directory) and all(
            s for d in self.may_be(directory) if isinstance(d, Directory) for s in d.states
        )

    def certain(self, path: PurePath) -> bool:
        """Whether a path exists after a power cut, with its bytes."""
        node: Node = self._root
        for part in path.relative_to(self._base).parts:
            if not isinstance(node, Directory) or any(part not in s for s in node.states):
                return False
            (*others, node) = {s[part] for s in node.states}
            if others and any(isinstance(o, Directory) or o.dirty for o in (*others, node)):
                return False
        return isinstance(node, Directory) or not node.dirty


class Paths(VolumePaths):
    """The paths of a store with all blobs on a volume, or without volumes."""

    def __init__(self, root: str, has_volume: bool) -> None:
        super().__init__(PurePath(root, "store"))  # type: ignore[arg-type]  # paths only, no disk
        self.versions = [self.version]
        self._at = ""
        if has_volume:
            self._at = "volume"
            self.add_volume(self._at, PurePath(root, "volume"))  # type: ignore[arg-type]  # the same
            self.versions.append(self.volume(self._at).version)

    def volume_of(self, blob: str) -> str:
        """The one place of all blobs."""
        return self._at


def violations(root: str, events: list[Call | tuple[str, str]], has_volume: bool = False) -> Iterator[str]:
    """What a power cut at some moment of a life would break: I1, I2, I6 and the orders of writing in `store/`."""
    disk, paths = StrictDisk(root), Paths(root, has_volume)
    deleting: Model | None = None
    renamed: list[Call] = []
    lost: set[str] = set()
    """Quarantined blobs: missing until the pull that repairs them, though the manifest stays."""
    for event in events:
        if isinstance(event, Call):
            if event.name == "unlink" and deleting is not None and "blobs" in PurePath(event.paths[0]).parts:
                tombstone = paths.tombstones / f"{paths.manifest(deleting.manifest.model).parent.name}"
                tombstone = tombstone.with_name(f"{tombstone.name}@{deleting.manifest.commit}.json")
                if not disk.certain(tombstone):
                    yield f"I6: {event}: a deletion that nothing would finish"
            disk.make(event)
            if event.name in ("rename", "replace"):
                renamed.append(event)
            yield from (f"{reason}: {event}" for reason in _at_any_time(disk, paths, lost))
        else:
            what, which = event
            if what in ("deleting", "deleted"):
                deleting = MODELS[which] if what == "deleting" else None
            if what == "setting-aside":
                lost.add(which)
            elif what == "committed":
                lost.discard(which)
            yield from (
                f"I6: {what} {which[:40]}: {reason}" for reason in _acknowledged(disk, paths, what, which, renamed)
            )


def _at_any_time(disk: StrictDisk, paths: Paths, lost: set[str]) -> Iterator[str]:
    if any(isinstance(v, File) and v.dirty for version in paths.versions for v in disk.may_be(version)):
        yield "a VERSION without its bytes"
    for model in MODELS.values():
        for blob in model.sealed.blob_sizes:
            if any(isinstance(f, File) and f.dirty for f in disk.may_be(paths.blob(blob))):
                yield f"I1: blob {blob[:12]} without its bytes"
            for bitmap in (paths.quarantined_have(blob), paths.partial(blob) / "have"):
                if any(isinstance(f, File) and f.dirty for f in disk.may_be(bitmap)):
                    yield f"I6: {bitmap.parent.name}/{bitmap.name[:12]} claims leaves without its bytes"
        manifests = disk.may_be(paths.manifest(model.sealed.model))
        if any(isinstance(m, File) and m.dirty for m in manifests):
            yield f"I2: the manifest of {model.name} without its bytes"
        for blob in model.sealed.blob_sizes if manifests else ():
            if not disk.certain(paths.blob(blob)) and blob not in lost:
                yield f"I2: the manifest of {model.name} without blob {blob[:12]}"


def _acknowledged(disk: StrictDisk, paths: Paths, what: str, which: str, renamed: list[Call]) -> Iterator[str]:
    here, gone = (
        _of_a_blob(paths, what, which, renamed) if which not in MODELS else _of_a_model(paths, what, MODELS[which])
    )
    for path in here:
        if not disk.certain(path):
            yield f"{path.relative_to(paths.root.parent)} may be lost"
    for path in gone:
        if disk.may_be(path):
            yield f"{path.relative_to(paths.root.parent)} may come back"
    if what == "reserved" and len(paths.versions) > 1 and not disk.remembers(paths.volumes):
        yield "the path of the volume may be forgotten"


def _of_a_blob(paths: Paths, what: str, which: str, renamed: list[Call]) -> tuple[list[PurePath], list[PurePath]]:
    """What certainly exists, and what certainly does not, once this was acknowledged."""
    partial: PurePath = paths.partial(which)
    aside: list[PurePath] = [paths.quarantined(which), paths.quarantined_have(which)]
    if what == "committed":
        # DESIGN §7: both directories of the rename.
        gone = [PurePath(c.paths[0]) for c in renamed if c.paths[1] == str(paths.blob(which))]
        return [*paths.versions, paths.blob(which), paths.leaf_list(which)], [*gone, *aside]
    if what == "quarantined":
        views = [
            paths.view_file(m.sealed, f.path) for m in MODELS.values() for f in m.sealed.files if f.sha256 == which
        ]
        return aside[:1], [paths.blob(which), *views]
    reserved: dict[str, tuple[list[PurePath], list[PurePath]]] = {
        "reserved": ([*paths.versions, partial / "meta.json"], []),
        "released": ([], [partial]),
        "kept-good": (aside[1:], []),
        "taken-back": ([partial / name for name in ("data", "have", "meta.json")], aside),
        "dropped": ([], aside),
    }
    return reserved.get(what, ([], []))


def _of_a_model(paths: Paths, what: str, model: Model) -> tuple[list[PurePath], list[PurePath]]:
    manifest = paths.manifest(model.sealed.model)
    tombstone = paths.tombstones / f"{manifest.parent.name}@{manifest.name}"
    own = set(model.sealed.blob_sizes) - {b for m in MODELS.values() if m != model for b in m.sealed.blob_sizes}
    pin: PurePath = paths.pin(model.manifest.model)
    reserved: dict[str, tuple[list[PurePath], list[PurePath]]] = {
        "sealed": ([manifest], []),
        "deleted": ([], [manifest, tombstone, *(paths.blob(b) for b in own)]),
        "pinned": ([pin], []),
        "unpinned": ([], [pin]),
    }
    return reserved.get(what, ([], []))
