"""Whether a node's manifest is what the hub lists at that commit."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import structs

from shoal_common.messages.manifest import Manifest, ManifestFile, content_commit


def names_itself(manifest: Manifest) -> bool:
    """Return whether the commit is made of the files, as that of a directory which no hub has: nothing to check."""
    return manifest.commit == content_commit(manifest.files)


def difference(manifest: Manifest, listing: Manifest) -> str:
    """Return the first file in which a node's manifest differs from the hub's listing, and how; "" if none does.

    The hub lists small files by git's sha1 alone: their sha256 is compared when their bytes are here.
    """
    theirs, listed = _by_path(manifest), _by_path(listing)
    for path in sorted(theirs.keys() | listed.keys()):
        if path not in listed:
            return f"the hub lists no {path}"
        if path not in theirs:
            return f"it lacks {path}"
        if reason := _file_difference(theirs[path], listed[path]):
            return f"{path} {reason}"
    return ""


def _file_difference(file: ManifestFile, listed: ManifestFile) -> str:
    if file.size_bytes != listed.size_bytes:
        return f"has {file.size_bytes} bytes instead of {listed.size_bytes}"
    if listed.sha256 and file.sha256 != listed.sha256:
        return f"has the sha256 {file.sha256[:16]}… instead of {listed.sha256[:16]}…"
    if listed.git_sha1 and file.git_sha1 not in ("", listed.git_sha1):
        return f"has the git sha1 {file.git_sha1[:16]}… instead of {listed.git_sha1[:16]}…"
    return ""


def with_listed_names(manifest: Manifest, listing: Manifest) -> Manifest:
    """Return a manifest that does not differ from the listing, with the hub's git sha1 of small files."""
    listed = _by_path(listing)
    files = [structs.replace(f, git_sha1=listed[f.path].git_sha1) for f in manifest.files]
    return structs.replace(manifest, files=files, unchecked_from="")


def by_git_name(manifest: Manifest) -> tuple[Manifest, Mapping[str, str]]:
    """Return the manifest with small files named by git's sha1, as the hub does, and their sha256 by that name.

    So storage verifies them by what the hub says, and a sha256 is no more than a hint of what to ask a node for.
    """
    files = [structs.replace(f, sha256="", leaf_list_digest="") if f.git_sha1 else f for f in manifest.files]
    sha256_by_git_name = {f"git-{f.git_sha1}": f.sha256 for f in manifest.files if f.git_sha1 and f.sha256}
    return structs.replace(manifest, files=files), sha256_by_git_name


def _by_path(manifest: Manifest) -> dict[str, ManifestFile]:
    return {f.path: f for f in manifest.files}
