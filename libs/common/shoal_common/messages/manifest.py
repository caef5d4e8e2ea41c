"""The files of a model at a commit, and the seals of their leaf lists."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from shoal_common.messages import WireStruct
from shoal_common.names import ModelId, model_id


class LeafListSeal(WireStruct):
    """A node's signed word that it hashed a whole blob, and that its leaves have this list (docs/transfer.md)."""

    node: str
    """The node that hashed the blob by sha256: the sealer."""
    signed_at_s: int
    """When it did, in whole seconds."""
    signature: bytes
    """ECDSA on P-256 with SHA-256, DER, by the key of the node's certificate, over what `SealedList` says."""


class ManifestFile(WireStruct):
    """One file of a model. A sealed manifest has every sha256; before that a small file may have only a sha1."""

    path: str
    """Path below the model's directory."""
    size_bytes: int
    """Size of the file."""
    sha256: str = ""
    """sha256 of the file; "" while unknown."""
    git_sha1: str = ""
    """git's sha1 of the file, as the hub lists small files; "" if it lists none."""
    leaf_list_digest: str = ""
    """Leaf list digest of the file (docs/transfer.md); "" if unknown."""

    @property
    def blob(self) -> str:
        """Name of the blob in the store: the sha256, or `git-<sha1>` while that is unknown."""
        return self.sha256 or f"git-{self.git_sha1}"


class Manifest(WireStruct):
    """The files of a model at a commit."""

    repo: str
    """`org/name`."""
    commit: str
    """Commit id of the hub's repository."""
    files: list[ManifestFile]
    """All files."""
    revisions: list[str] = []
    """Revisions that people used for this commit: `main`, a tag."""
    unchecked_from: str = ""
    """Node that this manifest is from, while it was not held against the hub's listing; "" if it was, or is that."""

    @property
    def model(self) -> ModelId:
        """`org/name@commit`: the one name that never changes its meaning."""
        return model_id(self.repo, self.commit)

    @property
    def sealed(self) -> bool:
        """Whether every file's sha256 is known."""
        return all(f.sha256 for f in self.files)

    @property
    def blob_sizes(self) -> dict[str, int]:
        """Size of each distinct blob: files with the same content count once."""
        return {f.blob: f.size_bytes for f in self.files}

    @property
    def size_bytes(self) -> int:
        """Size of all distinct blobs."""
        return sum(self.blob_sizes.values())


def content_commit(files: Iterable[ManifestFile]) -> str:
    """Return a commit for files that no hub names: equal for equal files under equal names."""
    digest = hashlib.sha1(usedforsecurity=False)
    for f in sorted(files, key=lambda f: f.path):
        digest.update(f"{f.path}\0{f.sha256}\n".encode())
    return digest.hexdigest()
