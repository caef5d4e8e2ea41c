"""Where things are in a store. The only place that builds these paths; names are checked before they come here.

<store>/VERSION lock reserve                 reserve: held back, given up first when the disk is full
  blobs/sha256/ab/<sha256>                   0444, hashes to its name (I1), shows its proof (proof.py)
  leaves/ab/<sha256>                         BLAKE3 of each leaf of a blob; its mtime is the blob's
  partial/<blob>/{data,have,meta.json}       data arriving, bitmap of durable leaves, the reservation
  partial/<blob>/{leaves,ready}              leaf list so far, bitmap of leaves to relay (docs/transfer.md)
  manifests/<org>--<name>/<commit>.json      what makes a model present (I2)
  views/<org>--<name>/<commit>/<path>        the directory MLX opens
  tombs/                                     on their way out
  pins/<org>--<name>@<commit>                empty; its being there is the pin
  uses/<org>--<name>@<commit>                empty; its mtime is the last use
  quarantine/<sha256>                        what did not hash to its name
  quarantine/<sha256>.have                   bitmap of its leaves that are good all the same
  promises/<org>--<name>@<commit>            blobs that a fetch under way counts on
  parts/<org>--<name>@<commit>               which layers of a model are here, where not all of it is
  leases/<id>/{lease.json,lock,view/<path>}  a caller's own view, kept while somebody holds a flock on `lock`
  adopted/verified.json                      files of read-only roots, as they were when they were hashed
  adopted/blobs/ab/<sha256>                  where in a read-only root the bytes of a blob are (`blobs.py`)
  adopted/models/<org>--<name>@<commit>      empty; the view of this model leads into a read-only root
  further/<id>                               symbolic link to a further root, on another disk

A further root has VERSION, lock, reserve, blobs/, partial/, tombs/ and quarantine/ as above. Of a blob that arrives
there, partial/<blob> in the store is a symbolic link to its directory.
"""

from __future__ import annotations

from pathlib import Path

from shoal_common.errors import BadName
from shoal_common.messages.records import Manifest
from shoal_common.names import ModelRef, check_blob, check_commit, check_file_path, check_id

LEAF_BYTES = 1 << 20
"""The unit of verification and of resuming."""
FORMAT_VERSION = "1"


class Layout:
    """Paths of one store."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.version = root / "VERSION"
        self.lock = root / "lock"
        self.reserve = root / "reserve"
        self.blobs = root / "blobs" / "sha256"
        self.leaf_lists = root / "leaves"
        self.partials = root / "partial"
        self.manifests = root / "manifests"
        self.views = root / "views"
        self.tombs = root / "tombs"
        self.pins = root / "pins"
        self.uses = root / "uses"
        self.promises = root / "promises"
        self.parts = root / "parts"
        self.quarantine = root / "quarantine"
        self.leases = root / "leases"
        self.verified = root / "adopted" / "verified.json"
        self.adopted_blobs = root / "adopted" / "blobs"
        self.adopted_models = root / "adopted" / "models"
        self.further = root / "further"

    @property
    def top_names(self) -> set[str]:
        """What the store's own files and directories at its top are called."""
        paths = [path for path in vars(self).values() if isinstance(path, Path) and path != self.root]
        return {path.relative_to(self.root).parts[0] for path in paths}

    def blob(self, sha256: str) -> Path:
        """A blob's file."""
        return self.blobs / check_blob(sha256)[:2] / sha256

    def leaves(self, sha256: str) -> Path:
        """The file with the hashes of a blob's leaves."""
        return self.leaf_lists / check_blob(sha256)[:2] / sha256

    def set_aside(self, sha256: str) -> Path:
        """Where a blob goes that is not what it is called."""
        return self.quarantine / check_blob(sha256)

    def set_aside_have(self, sha256: str) -> Path:
        """The bitmap of the good leaves of a blob that was set aside."""
        return self.quarantine / f"{check_blob(sha256)}.have"

    def partial(self, blob: str) -> Path:
        """The directory of a blob that is arriving."""
        return self.partials / check_blob(blob)

    def partial_leaves(self, blob: str) -> Path:
        """The leaf list of a blob that is arriving, zeros where it is not known yet."""
        return self.partial(blob) / "leaves"

    def partial_ready(self, blob: str) -> Path:
        """Which leaves of it can be relayed, in this boot."""
        return self.partial(blob) / "ready"

    def manifest(self, repo: str, commit: str) -> Path:
        """A manifest's file."""
        return self.manifests / directory_of(repo) / f"{check_commit(commit)}.json"

    def view(self, repo: str, commit: str) -> Path:
        """The directory with a model's files under their own names."""
        return self.views / directory_of(repo) / check_commit(commit)

    def pin(self, repo: str, commit: str) -> Path:
        """The file that pins a model."""
        return self.pins / f"{directory_of(repo)}@{check_commit(commit)}"

    def use(self, repo: str, commit: str) -> Path:
        """The file whose mtime is a model's last use."""
        return self.uses / f"{directory_of(repo)}@{check_commit(commit)}"

    def promise(self, repo: str, commit: str) -> Path:
        """The file that says which blobs a fetch under way counts on."""
        return self.promises / f"{directory_of(repo)}@{check_commit(commit)}"

    def part(self, repo: str, commit: str) -> Path:
        """The file that says what is here of a model that is not here whole."""
        return self.parts / f"{directory_of(repo)}@{check_commit(commit)}"

    def adopted_blob(self, sha256: str) -> Path:
        """The file that says where in a read-only root a blob's bytes are."""
        return self.adopted_blobs / check_blob(sha256)[:2] / sha256

    def adopted_model(self, repo: str, commit: str) -> Path:
        """The file that is there as long as a model's view leads into a read-only root."""
        return self.adopted_models / f"{directory_of(repo)}@{check_commit(commit)}"

    def view_file(self, manifest: Manifest, path: str) -> Path:
        """A file in a view."""
        return file_in(self.view(manifest.repo, manifest.commit), path)

    def lease(self, lease: str) -> Path:
        """The directory of a lease, by its id."""
        return self.leases / check_id(lease)

    def lease_lock(self, lease: str) -> Path:
        """The file whose flock says that a lease lives."""
        return self.lease(lease) / "lock"

    def lease_view(self, lease: str) -> Path:
        """The view that is the lease holder's own."""
        return self.lease(lease) / "view"


def file_in(view: Path, path: str) -> Path:
    """A model's file in a view of it."""
    return view / check_file_path(path)


def directory_of(repo: str) -> str:
    """`org/name` as one directory name. `--` never occurs in either part, so this can be undone."""
    return repo.replace("/", "--")


def model_of(directory: str, commit: str) -> str:
    """The model (`org/name@commit`) that `<org>--<name>` and a commit stand for. Raises BadName."""
    ref = ModelRef.parse(directory.replace("--", "/", 1))
    if directory_of(ref.repo) != directory:
        raise BadName(f"{directory!r} is not the directory of a model")
    return f"{ref.repo}@{check_commit(commit)}"


def leaf_count(size_bytes: int) -> int:
    """How many leaves a blob has."""
    return -(-size_bytes // LEAF_BYTES)


class Bitmap:
    """Which leaves of a partial are durable: bit i of byte i // 8, least significant first, is leaf i."""

    def __init__(self, size_bytes: int, data: bytes = b"") -> None:
        self.size_bytes = size_bytes
        self.leaves = leaf_count(size_bytes)
        expected = -(-self.leaves // 8)
        # A bitmap of another length belongs to another size: nothing in it can be believed.
        self._bits = bytearray(data) if len(data) == expected else bytearray(expected)

    def add(self, leaf: int) -> None:
        """Note a leaf as durable."""
        self._bits[leaf // 8] |= 1 << (leaf % 8)

    def __contains__(self, leaf: int) -> bool:
        return bool(self._bits[leaf // 8] >> (leaf % 8) & 1)

    @property
    def complete(self) -> bool:
        """Whether every leaf is there."""
        return all(leaf in self for leaf in range(self.leaves))

    def leaf_bytes(self, leaf: int) -> int:
        """Size of a leaf: 1 MiB, less for the last one."""
        return min(LEAF_BYTES, self.size_bytes - leaf * LEAF_BYTES)

    @property
    def have_bytes(self) -> int:
        """Bytes of the leaves that are there."""
        return sum(self.leaf_bytes(leaf) for leaf in range(self.leaves) if leaf in self)

    def missing_runs(self) -> list[tuple[int, int]]:
        """Byte ranges [start, end) still to fetch, in order, adjacent leaves joined."""
        runs: list[tuple[int, int]] = []
        for leaf in range(self.leaves):
            if leaf in self:
                continue
            start, end = leaf * LEAF_BYTES, leaf * LEAF_BYTES + self.leaf_bytes(leaf)
            if runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], end)
            else:
                runs.append((start, end))
        return runs

    def to_bytes(self) -> bytes:
        """The file `have`."""
        return bytes(self._bits)
