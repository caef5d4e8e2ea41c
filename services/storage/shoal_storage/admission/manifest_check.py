"""Check a manifest from outside, once, at the edge (I10)."""

from __future__ import annotations

from shoal_common.errors import BadInput, BadName
from shoal_common.messages.manifest import Manifest
from shoal_common.names import ModelRef, check_blob, check_commit, check_file_path
from shoal_storage.admission.name_folding import NameFolding

_GIT = "git-"


def check_manifest(manifest: Manifest) -> None:
    """Check every name and size of a foreign manifest, once, at the edge (I10). Raises BadName, BadInput."""
    if ModelRef.parse(manifest.repo).repo != manifest.repo:
        raise BadName(f"{manifest.repo[:200]!r} is not a model repository: expected org/name")
    check_commit(manifest.commit)
    for revision in manifest.revisions:
        ModelRef.parse(f"{manifest.repo}@{revision}")
    sizes: dict[str, int] = {}
    paths: set[str] = set()
    for f in manifest.files:
        check_file_path(f.path)
        check_blob(f.blob)
        if f.sha256.startswith(_GIT):
            raise BadName(f"{f.sha256!r}, given for {f.path}, is not a sha256")
        if f.path in paths:
            raise BadInput(f"the manifest of {manifest.model} lists {f.path} twice")
        if f.size_bytes < 0 or sizes.setdefault(f.blob, f.size_bytes) != f.size_bytes:
            raise BadInput(f"the manifest of {manifest.model} gives {f.path} an impossible size: {f.size_bytes}")
        paths.add(f.path)
    if (clash := NameFolding().clash(paths)) is not None:
        raise BadInput(f"in the manifest of {manifest.model} {clash[0]} is both a file and a directory")


def check_layout(manifest: Manifest, folding: NameFolding) -> None:
    """Raise BadInput, naming two files, if a file system that folds names so cannot hold both."""
    clash = folding.clash(f.path for f in manifest.files)
    if clash is not None:
        raise BadInput(
            f"{manifest.model} has the files {clash[0]!r} and {clash[1]!r}, which are one name on this node's disk, "
            "as it ignores case or accents' forms: pull it on a node whose disk tells them apart"
        )
