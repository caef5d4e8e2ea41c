"""The files of a model at a commit."""

from __future__ import annotations

from shoal_common.messages import WireStruct
from shoal_common.names import ModelId, model_id


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
