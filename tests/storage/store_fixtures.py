"""A store opened as the service opens it, models to put into it, and the invariants of any store."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from msgspec import structs

from shoal_common.errors import BadMessage
from shoal_common.messages import decode
from shoal_common.messages.manifest import Manifest, ManifestFile
from shoal_common.names import ModelId
from shoal_common.settings.node import StorageSettings
from shoal_common.store.bitmap import LEAF_BYTES, Bitmap, leaf_count
from shoal_common.store.leaf_hash import hash_leaf_list, leaf_hash
from shoal_common.store.store_paths import StorePaths
from shoal_storage.admission.admission import admit
from shoal_storage.admission.allocator import VolumeSpace
from shoal_storage.integrity.quarantine import quarantined_blobs
from shoal_storage.integrity.repair import create_partial, repairable_bytes
from shoal_storage.leases import lease_files
from shoal_storage.ledger.lease import LOCK_DEADLINE_S, ModelLease
from shoal_storage.ledger.references import blobs_freed_by
from shoal_storage.startup import recover_store
from shoal_storage.store.commit import commit_blob, require_all_blobs, seal_model, set_volume
from shoal_storage.store.partials import has_partial, verify_partial, write_partial
from shoal_storage.store.store import Store
from shoal_storage.store.tombstones import begin_delete, finish_delete
from shoal_storage.store.volume import open_volume, record_volume

UNLIMITED = StorageSettings(quota_bytes=None, headroom_bytes=0)


def sha256(data: bytes) -> str:
    """The name of a blob with these bytes."""
    return hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
    """The git sha1 of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def leaf_list(data: bytes) -> bytes:
    """The leaf list of a blob with these bytes."""
    return b"".join(leaf_hash(data[at : at + LEAF_BYTES]) for at in range(0, len(data), LEAF_BYTES))


class Model:
    """A model with its bytes. Files listed in `by_git` are named by git sha1, as the hub names small ones."""

    def __init__(self, repo: str, files: Mapping[str, bytes], by_git: tuple[str, ...] = (), commit: str = "") -> None:
        commit = commit or hashlib.sha1(repo.encode(), usedforsecurity=False).hexdigest()
        self.bytes = dict(files)
        self.manifest = Manifest(
            repo=repo,
            commit=commit,
            revisions=["main"],
            files=[
                ManifestFile(
                    path=path,
                    size_bytes=len(data),
                    sha256="" if path in by_git else sha256(data),
                    git_sha1=git_sha1(data) if path in by_git else "",
                )
                for path, data in files.items()
            ],
        )
        self.sealed = Manifest(
            repo=repo,
            commit=commit,
            revisions=["main"],
            files=[ManifestFile(path=p, size_bytes=len(d), sha256=sha256(d)) for p, d in files.items()],
        )

    @property
    def kept(self) -> Manifest:
        """The sealed manifest with leaf list digests, as kept by a service that has hashed every leaf."""
        files = [
            structs.replace(f, leaf_list_digest=hash_leaf_list(leaf_list(self.bytes[f.path])))
            for f in self.sealed.files
        ]
        return structs.replace(self.sealed, files=files)

    @property
    def name(self) -> ModelId:
        """`org/name@commit`."""
        return self.manifest.model

    @property
    def blobs(self) -> dict[str, bytes]:
        """Its bytes by the names that blobs arrive under."""
        return {f.blob: self.bytes[f.path] for f in self.manifest.files}


def put_missing(layout: StorePaths, blob: str, data: bytes) -> set[int]:
    """Write the leaves that a partial blob lacks, as the fetcher does, and return them."""
    directory = layout.partial(blob)
    missing = set(range(leaf_count(len(data)))) - claimed_leaves(directory, data)
    with (directory / "data").open("r+b") as f:
        for leaf in missing:
            f.seek(leaf * LEAF_BYTES)
            f.write(data[leaf * LEAF_BYTES : (leaf + 1) * LEAF_BYTES])
    return missing


def claimed_leaves(directory: Path, data: bytes) -> set[int]:
    """Return the leaves that a partial blob claims, after checking their bytes."""
    try:
        claimed, here = Bitmap(len(data), (directory / "have").read_bytes()), (directory / "data").read_bytes()
    except FileNotFoundError:
        return set()
    leaves = {leaf for leaf in range(claimed.leaf_count) if leaf in claimed}
    for leaf in leaves:
        at = slice(leaf * LEAF_BYTES, leaf * LEAF_BYTES + claimed.leaf_bytes(leaf))
        assert here[at] == data[at], f"leaf {leaf} of {directory.name[:12]} is claimed, and it is not good"
    return leaves


def put(layout: StorePaths, blob: str, data: bytes) -> None:
    """Write all bytes into a partial blob and a complete bitmap, as the fetcher does."""
    directory = layout.partial(blob)
    with (directory / "data").open("r+b") as f:
        f.write(data)
    bitmap = Bitmap(len(data))
    for leaf in range(bitmap.leaf_count):
        bitmap.add(leaf)
    (directory / "have").write_bytes(bitmap.to_bytes())


class StoreFixture:
    """A disk and its ledger, driven as the service drives them."""

    def __init__(self, root: Path, volume: Path | None = None) -> None:
        self.root = root
        self.disk = Store(root)
        self.layout = self.disk.layout
        self.disk.open()
        self.onto = ""
        """The volume to which blobs go from now on; "" for the store itself."""
        if volume is not None:
            self.join(volume)
        self.ledger = recover_store(self.disk, lease_files.read_leases(self.disk, time.monotonic(), time.time()))
        self.ledger.add_quarantined(quarantined_blobs(self.disk))

    def join(self, volume: Path) -> str:
        """Attach a volume; at a start, before anything is read. Returns its id."""
        opened = open_volume(self.layout, volume)
        record_volume(self.layout, opened)
        self.disk.attach_volume(opened)
        return opened.id

    def reserve(self, model: Model) -> list[str]:
        """Reserve what is missing and return it."""
        # Both are on one disk here, which storage would count once; with plenty of space it makes no difference.
        free, in_flight = self.disk.free_bytes(), self.ledger.arrivals.in_flight_by_volume
        spaces = [
            VolumeSpace(volume, str(paths.root), free, in_flight[volume])
            for volume, paths in self.layout.each_volume()
        ]
        missing = admit(model.manifest, self.ledger, UNLIMITED, free, spaces).missing
        for blob in missing:
            if blob not in self.ledger.arrivals.partials:
                bound = blob in self.ledger.quarantined and repairable_bytes(self.disk, blob)
                set_volume(self.disk, blob, self.layout.volume_of(blob) if bound else self.onto)
            self.ledger.arrivals.reserve_blob(blob, model.manifest.blob_sizes[blob], model.name)
            partial = self.ledger.arrivals.partials[blob]
            if has_partial(self.disk, blob):
                write_partial(self.disk, blob, partial.size_bytes, partial.models)
            else:
                create_partial(self.disk, blob, partial.size_bytes, partial.models)
            claimed_leaves(self.layout.partial(blob), model.blobs[blob])
        return missing

    def commit(self, blob: str) -> str:
        """Verify and commit a partial blob."""
        digests = verify_partial(self.disk, blob, self.ledger.arrivals.partials[blob].size_bytes)
        commit_blob(self.disk, blob, digests)
        self.ledger.commit_blob(blob, digests.sha256, digests.size_bytes)
        return digests.sha256

    def bring_in(self, model: Model) -> None:
        """Download and seal a model."""
        for blob in self.reserve(model):
            put(self.layout, blob, model.blobs[blob])
            self.commit(blob)
        self.seal(model)

    def seal(self, model: Model) -> None:
        """Seal a model whose blobs are present."""
        require_all_blobs(model.sealed, self.ledger)
        seal_model(self.disk, model.sealed)
        self.ledger.seal(model.sealed)

    def delete(self, model: Model) -> None:
        """Delete a model."""
        blobs = blobs_freed_by(model.name, self.ledger)
        begin_delete(self.disk, model.manifest.model)
        finish_delete(self.disk, model.manifest.model, blobs)
        self.ledger.drop_manifest(model.name)
        for blob in blobs:
            self.ledger.drop_blob(blob)

    def lease(self, model: Model, name: str) -> ModelLease:
        """Create a lease on a model; nobody holds it yet."""
        files = {f.path: f.sha256 for f in model.sealed.files}
        until_s = time.monotonic() + LOCK_DEADLINE_S
        lease = ModelLease(name, model.name, "a test", "", time.time(), files, until_s)
        lease_files.create_lease(self.disk, lease)
        self.ledger.uses.add_lease(lease)
        return lease

    def end(self, lease: ModelLease) -> bool:
        """Remove a lease unless somebody holds it."""
        if not lease_files.remove_unless_held(self.disk, lease.id):
            return False
        self.ledger.uses.end_lease(lease.id)
        return True

    def leased_view_is_complete(self, lease: ModelLease, model: Model) -> bool:
        """Whether every file of a lease's view has the right bytes."""
        view = self.layout.lease_view(lease.id)
        return all((view / path).read_bytes() == data for path, data in model.bytes.items())

    def holds(self, model: Model) -> bool:
        """Whether a model is complete, every byte of its view included."""
        view = self.layout.view(model.manifest.model)
        return model.name in self.ledger.manifests and all(
            (view / path).read_bytes() == data for path, data in model.bytes.items()
        )


def check_invariants(root: Path, corrupt: str = "", volume: Path | None = None) -> None:
    """Check I1 and I2, which hold at any moment, whatever was killed; foreign files are ignored.

    A blob that the disk itself has corrupted, `rotten`, is exempt until it is verified.
    """
    layout = StorePaths(root)
    volumes = [layout, *([StorePaths(volume)] if volume else [])]
    for path in [p for volume_paths in volumes for p in volume_paths.blobs.glob("*/*")]:
        if path.name != corrupt and len(path.name) == 64 and path.parent.name == path.name[:2] and path.is_file():
            assert sha256(path.read_bytes()) == path.name, f"I1: {path.name} does not hash to its name"
    for path in layout.manifests.glob("*/*.json"):
        with suppress(BadMessage):
            for f in decode(path.read_bytes(), Manifest).files:
                assert f.sha256 == corrupt or any(
                    volume_paths.blob(f.sha256).is_file() for volume_paths in volumes
                ), f"I2: {path} is there and its blob {f.sha256} is not"


def files_below(root: Path) -> set[str]:
    """Every file of a store except its own two, relative to it; the store may change meanwhile."""
    found = set()
    for directory, subdirectories, files in os.walk(root):  # skips what is deleted during the walk
        links = [name for name in subdirectories if (Path(directory) / name).is_symlink()]
        found |= {str((Path(directory) / name).relative_to(root)) for name in (*files, *links)}
    return found - {"VERSION", "lock"}


def files_of(*models: Model) -> set[str]:
    """The files that a store with exactly these models has."""
    layout = StorePaths(Path())
    return {
        str(path)
        for m in models
        for path in (
            layout.manifest(m.sealed.model),
            *(layout.blob(f.sha256) for f in m.sealed.files),
            *(layout.leaf_list(f.sha256) for f in m.sealed.files),
            *(layout.view_file(m.sealed, f.path) for f in m.sealed.files),
        )
    }
