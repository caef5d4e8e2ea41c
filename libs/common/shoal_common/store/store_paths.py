"""Paths in a store. The only place that builds them; names are checked before they come here (I10).

No two names here differ in case alone: on file systems that ignore case they would be one file.
"""

from __future__ import annotations

import re
from pathlib import Path

from shoal_common.errors import BadName
from shoal_common.messages.manifest import Manifest
from shoal_common.names import (
    ModelId,
    check_blob,
    check_commit,
    check_file_path,
    check_id,
    check_model_id,
    check_node,
    commit_of,
    repo_of,
)

FORMAT_VERSION = "2"
NAMES_WITH_CASE_VERSION = "1"
"""The format before, whose names of models had capitals. Storage renames them at its start."""
_CAPITAL = re.compile("[A-Z]")
_MARKED = re.compile(r"\+([a-z])")


class StorePaths:
    """Paths of one store."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.version = root / "VERSION"
        self.lock = root / "lock"
        self.ballast = root / "ballast"
        self.blobs = root / "blobs" / "sha256"
        self.leaf_lists = root / "leaves"
        self.partials = root / "partial"
        self.manifests = root / "manifests"
        self.views = root / "views"
        self.tombstones = root / "tombs"
        self.pins = root / "pins"
        self.uses = root / "uses"
        self.reservations = root / "reservations"
        self.shards = root / "shards"
        self.quarantine = root / "quarantine"
        self.leases = root / "leases"
        self.distrusted = root / "distrusted"
        self.library_hashes = root / "libraries" / "verified.json"
        self.library_blobs = root / "libraries" / "blobs"
        self.library_models = root / "libraries" / "models"
        self.volumes = root / "volumes"

    @property
    def top_names(self) -> set[str]:
        """Names of the store's own files and directories at its top level."""
        paths = [path for path in vars(self).values() if isinstance(path, Path) and path != self.root]
        return {path.relative_to(self.root).parts[0] for path in paths}

    @property
    def top_paths(self) -> list[Path]:
        """The store's directory, and its own files and directories at its top level."""
        return [self.root, *(self.root / name for name in sorted(self.top_names))]

    def blob(self, sha256: str) -> Path:
        """Return a blob's file."""
        return self.blobs / check_blob(sha256)[:2] / sha256

    def leaf_list(self, sha256: str) -> Path:
        """Return the file with the hashes of a blob's leaves."""
        return self.leaf_lists / check_blob(sha256)[:2] / sha256

    def seal(self, sha256: str) -> Path:
        """Return the seal of a blob's leaf list."""
        return self.leaf_lists / check_blob(sha256)[:2] / f"{sha256}.seal"

    def distrusted_sealer(self, node: str) -> Path:
        """Return the file that exists while a node's seals are not trusted here."""
        return self.distrusted / check_node(node)

    def quarantined(self, sha256: str) -> Path:
        """Return the path of a corrupt blob in quarantine."""
        return self.quarantine / check_blob(sha256)

    def quarantined_have(self, sha256: str) -> Path:
        """Return the bitmap of the good leaves of a blob in quarantine."""
        return self.quarantine / f"{check_blob(sha256)}.have"

    def partial(self, blob: str) -> Path:
        """Return the directory of a partial blob."""
        return self.partials / check_blob(blob)

    def partial_leaves(self, blob: str) -> Path:
        """Return the leaf list of a partial blob; unknown hashes are zeros."""
        return self.partial(blob) / "leaves"

    def relay_bitmap(self, blob: str) -> Path:
        """Return the relay bitmap of a partial blob, valid for this boot."""
        return self.partial(blob) / "ready"

    def manifest(self, model: ModelId) -> Path:
        """Return a manifest's file."""
        return self.manifests / directory_of(repo_of(model)) / f"{check_commit(commit_of(model))}.json"

    def view(self, model: ModelId) -> Path:
        """Return the directory with a model's files under their own names."""
        return self.views / directory_of(repo_of(model)) / check_commit(commit_of(model))

    def pin(self, model: ModelId) -> Path:
        """Return the file that pins a model."""
        return self.pins / model_file_name(model)

    def use(self, model: ModelId) -> Path:
        """Return the file whose mtime is a model's last use."""
        return self.uses / model_file_name(model)

    def reservation(self, model: ModelId) -> Path:
        """Return the reservation: the file with the blobs that a running download relies on."""
        return self.reservations / model_file_name(model)

    def shard(self, model: ModelId) -> Path:
        """Return the file that says which layers of an incomplete model are here."""
        return self.shards / model_file_name(model)

    def library_blob(self, sha256: str) -> Path:
        """Return the file that says where a library holds a blob."""
        return self.library_blobs / check_blob(sha256)[:2] / sha256

    def library_model(self, model: ModelId) -> Path:
        """Return the file that exists while a model's view leads into a library."""
        return self.library_models / model_file_name(model)

    def view_file(self, manifest: Manifest, path: str) -> Path:
        """Return a file in a view."""
        return view_file_path(self.view(manifest.model), path)

    def lease(self, lease: str) -> Path:
        """Return a lease's directory."""
        return self.leases / check_id(lease)

    def lease_lock(self, lease: str) -> Path:
        """Return the file whose flock keeps a lease alive."""
        return self.lease(lease) / "lock"

    def lease_view(self, lease: str) -> Path:
        """Return the lease holder's own view."""
        return self.lease(lease) / "view"


def view_file_path(view: Path, path: str) -> Path:
    """Return a model's file in a view of it."""
    return view / check_file_path(path)


def directory_of(repo: str) -> str:
    """Return `org/name` as one directory name: `Org/X` is `+org--+x`. Reversible: a part has neither `--` nor `+`."""
    return _CAPITAL.sub(lambda capital: f"+{capital[0].lower()}", repo).replace("/", "--")


def model_file_name(model: ModelId) -> str:
    """Return `<org>--<name>@<commit>`, the name of a file that is about a model."""
    return f"{directory_of(repo_of(model))}@{check_commit(commit_of(model))}"


def model_from_file_name(name: str) -> ModelId:
    """Return the model of a file `<org>--<name>@<commit>`. Raises BadName."""
    model = model_from_old_file_name(_MARKED.sub(lambda marked: marked[1].upper(), name))
    if model_file_name(model) != name:
        raise BadName(f"{name!r} is not the name of a model's file")
    return model


def model_from_directory(directory: str, commit: str) -> ModelId:
    """Return the model of a directory `<org>--<name>` and a commit. Raises BadName."""
    return model_from_file_name(f"{directory}@{commit}")


def model_from_old_file_name(name: str) -> ModelId:
    """Return the model of a file of format 1, whose name has the model's capitals. Raises BadName."""
    return check_model_id(name.replace("--", "/", 1))


def old_manifest_path(model: ModelId) -> str:
    """Return the path of a manifest in a store of format 1, relative to the store."""
    return f"manifests/{repo_of(model).replace('/', '--')}/{commit_of(model)}.json"
