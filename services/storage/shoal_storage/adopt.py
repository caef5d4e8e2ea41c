"""What in a read-only root is a model, from a listing of it, and which models may be offered. Pure.

Three kinds are known, side by side in one root or not:

    models--<org>--<name>/{refs/<revision>,snapshots/<commit>/<path>,blobs/<etag>}   a Hugging Face cache
    VERSION manifests/<org>--<name>/<commit>.json blobs/sha256/ab/<sha256>           another store of Shoal
    <org>/<name>/{config.json,*.safetensors,…}                                       a person's own: org/name@local
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from shoal_common.errors import BadName, ShoalError
from shoal_common.layout import FORMAT_VERSION, Layout
from shoal_common.messages import Message, decode
from shoal_common.messages.records import Manifest, ManifestFile
from shoal_common.names import LOCAL_REVISION, ModelRef, check_commit, check_file_path
from shoal_storage.adopted import Adopted, File, Seen
from shoal_storage.decide import check_manifest

MOST_DEPTH = 16
_CACHED = "models--"
_CACHED_PARTS = ("refs", "snapshots", "blobs")
_NO_MODELS = ("datasets--", "spaces--", ".")
_WEIGHTS = (".safetensors", ".gguf", ".npz", ".bin", ".pt", ".pth")
_INDEX = ".safetensors.index.json"
_UNFINISHED = ".incomplete"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")


class Entry(msgspec.Struct, frozen=True):
    """A name in a root. `target` is what a link says, as it says it."""

    kind: Literal["file", "directory", "link", "other"]
    seen: Seen = Seen(0, 0, 0)
    target: str = ""


class Listing(msgspec.Struct):
    """What is below a root, by path relative to it, and the small files that say what the others are."""

    root: str
    entries: dict[str, Entry] = {}
    texts: dict[str, bytes] = {}
    unreadable: dict[str, str] = {}
    """Directories that could not be listed, and why."""


class Candidate(msgspec.Struct, frozen=True):
    """A model as a root holds it, not yet hashed. `commit` "": its content will say."""

    repo: str
    commit: str
    revisions: tuple[str, ...]
    root: str
    directory: str
    files: tuple[File, ...]


class Recognised(msgspec.Struct):
    """The models of a root, and what looks like one and is none, by directory, with the reason."""

    candidates: list[Candidate] = []
    refused: dict[str, str] = {}


class Verified(Message):
    """What a file hashed to, and how it stood then. `rotten`: looked at again, it hashed to something else."""

    seen: Seen
    sha256: str
    git_sha1: str = ""
    rotten: bool = False


class Verdict(msgspec.Struct):
    """What follows from what was recognised and what has been hashed."""

    adopted: dict[str, Adopted] = {}
    """By `org/name@commit`."""
    waiting: list[Candidate] = []
    refused: dict[str, str] = {}
    corrupt: dict[str, str] = {}
    """Of those refused, the files that are not what they are called, by path, with the model's directory."""


class _NotOne(Exception):
    """Ends the reading of a candidate, with the reason."""


# What to look at


def is_store(top: Iterable[str]) -> bool:
    """Whether the names at the top of a root are those of a store of Shoal."""
    return {"VERSION", "manifests", "blobs"} <= set(top)


def leads_to_models(parts: tuple[str, ...], store: bool) -> bool:
    """Whether a directory, by its path's parts, is worth listing."""
    if len(parts) > MOST_DEPTH:
        return False
    if store:
        return parts[0] == "manifests" or parts[:2] in (("blobs",), ("blobs", "sha256"))
    if parts[0].startswith(_CACHED):
        return len(parts) == 1 or parts[1] in _CACHED_PARTS
    return not parts[0].startswith(_NO_MODELS) and not any(p.startswith(".") for p in parts)


def is_to_be_read(path: str, store: bool) -> bool:
    """Whether a file says what others are."""
    parts = path.split("/")
    if store:
        return path == "VERSION" or (parts[0] == "manifests" and path.endswith(".json"))
    if parts[0].startswith(_CACHED):
        return parts[1:2] == ["refs"] or (parts[1:2] == ["snapshots"] and path.endswith(_INDEX))
    return path.endswith(_INDEX)


def cached_blob(path: str, target: str, root: str) -> str | None:
    """The blob of a Hugging Face cache that a link of the same model leads to, as a path in the root; else None."""
    top = path.split("/", 1)[0]
    if target.startswith(f"{root}/"):
        target = f"/{target.removeprefix(root)}"
        found = posixpath.normpath(target).lstrip("/")
    else:
        found = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
    parts = found.split("/")
    return found if top.startswith(_CACHED) and len(parts) == 3 and parts[:2] == [top, "blobs"] else None


# What is there


def recognise(listing: Listing) -> Recognised:
    """The models of a root, in order of their directories."""
    paths = sorted(listing.entries)
    found = Recognised()
    top = [p for p in paths if "/" not in p]
    for path, why in listing.unreadable.items():
        found.refused[_at(listing, path)] = f"it cannot be listed: {why}"
    if is_store(top):
        _read_store(listing, paths, found)
        return found
    for name in top:
        if name.startswith(_CACHED):
            _read_cached(listing, paths, name, found)
        elif not name.startswith(_NO_MODELS) and listing.entries[name].kind == "directory":
            for path in _below(paths, name):
                if path.count("/") == 1:
                    _read_plain(listing, paths, path, found)
    return found


def _at(listing: Listing, path: str) -> str:
    return f"{listing.root.rstrip('/')}/{path}"


def _below(paths: list[str], directory: str) -> list[str]:
    """What is below a directory, of sorted paths ("0" is what follows "/")."""
    return paths[bisect_left(paths, f"{directory}/") : bisect_left(paths, f"{directory}0")]


def _read_cached(listing: Listing, paths: list[str], top: str, found: Recognised) -> None:
    entry = listing.entries[top]
    repo = top.removeprefix(_CACHED).replace("--", "/")
    try:
        if entry.kind == "link":
            raise _NotOne(f"it is a link, to {entry.target[:200]}: make where it leads a root of its own")
        if entry.kind != "directory":
            return
        if ModelRef.parse(repo).repo != repo:
            raise _NotOne("its name is not that of a model, org/name")
    except (BadName, _NotOne) as e:
        found.refused[_at(listing, top)] = str(e)
        return
    revisions: dict[str, list[str]] = {}
    for path in _below(paths, f"{top}/refs"):
        if listing.entries[path].kind == "file":
            name = path.removeprefix(f"{top}/refs/")
            try:
                commit = check_commit(listing.texts.get(path, b"").decode(errors="replace").strip())
                if ModelRef.parse(f"{repo}@{name}").revision != LOCAL_REVISION:
                    revisions.setdefault(commit, []).append(name)
            except BadName as e:
                found.refused[_at(listing, path)] = str(e)
    for snapshot in _below(paths, f"{top}/snapshots"):
        if snapshot.count("/") == 2 and listing.entries[snapshot].kind == "directory":
            try:
                commit = check_commit(snapshot.rpartition("/")[2])
                files = _cached_files(listing, paths, snapshot)
                _require_whole(listing, snapshot, files)
            except (BadName, _NotOne) as e:
                found.refused[_at(listing, snapshot)] = str(e)
                continue
            names = tuple(sorted(revisions.get(commit, [])))
            found.candidates.append(
                Candidate(repo, commit, names, listing.root, _at(listing, snapshot), tuple(files))
            )


def _cached_files(listing: Listing, paths: list[str], snapshot: str) -> list[File]:
    files = []
    for path in _below(paths, snapshot):
        entry, expected, source = listing.entries[path], "", path
        if entry.kind == "directory":
            continue
        name = check_file_path(path.removeprefix(f"{snapshot}/"))
        if entry.kind == "link":
            blob = cached_blob(path, entry.target, listing.root)
            if blob is None:
                raise _NotOne(f"{name} leads elsewhere than into blobs/ of the cache, to {entry.target[:200]}")
            if blob not in listing.entries:
                unfinished = f"{blob}{_UNFINISHED}" in listing.entries
                raise _NotOne(f"{name} is not there{': its download was broken off' if unfinished else ''}")
            source, entry = blob, listing.entries[blob]
            etag = blob.rpartition("/")[2]
            expected = etag if _SHA256.fullmatch(etag) else f"git-{etag}" if _SHA1.fullmatch(etag) else ""
        if entry.kind != "file":
            raise _NotOne(f"{name} is not a file")
        files.append(File(name, _at(listing, source), entry.seen, expected))
    return files


def _require_whole(listing: Listing, directory: str, files: Iterable[File]) -> None:
    """Refuse a part of a model: whoever took it for all of it would never get the rest."""
    names = {f.path for f in files}
    if not any(n.endswith(_WEIGHTS) for n in names):
        raise _NotOne("it has no weights")
    for name in sorted(names):
        if name.endswith(_INDEX):
            shards = _shards(listing.texts.get(f"{directory}/{name}", b""))
            missing = sorted(s for s in shards if posixpath.join(posixpath.dirname(name), s) not in names)
            if missing:
                raise _NotOne(f"{missing[0][:200]}, which {name} speaks of, is not there: it is part of a model")


def _shards(text: bytes) -> set[str]:
    try:
        return set(msgspec.json.decode(text, type=_Index).weight_map.values())
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return set()


class _Index(msgspec.Struct):
    weight_map: dict[str, str] = {}


def _read_plain(listing: Listing, paths: list[str], directory: str, found: Recognised) -> None:
    entries = listing.entries
    if entries[directory].kind != "directory" or f"{directory}/config.json" not in entries:
        return
    below = _below(paths, directory)
    if not any(p.endswith(_WEIGHTS) for p in below):
        return
    files = []
    try:
        if ModelRef.parse(directory).repo != directory:
            raise _NotOne("its name is not that of a model, org/name")
        for path in below:
            name = path.removeprefix(f"{directory}/")
            # What is hidden is no part of a model: a download's notes, an editor's.
            if any(part.startswith(".") for part in name.split("/")) or entries[path].kind == "directory":
                continue
            check_file_path(name)
            if entries[path].kind != "file":
                raise _NotOne(f"{name} is not a file" + (" but a link" if entries[path].kind == "link" else ""))
            files.append(File(name, _at(listing, path), entries[path].seen))
        _require_whole(listing, directory, files)
    except (BadName, _NotOne) as e:
        found.refused[_at(listing, directory)] = str(e)
        return
    at = _at(listing, directory)
    found.candidates.append(Candidate(directory, "", (LOCAL_REVISION,), listing.root, at, tuple(files)))


def _read_store(listing: Listing, paths: list[str], found: Recognised) -> None:
    version = listing.texts.get("VERSION", b"").decode(errors="replace").strip()
    if version != FORMAT_VERSION:
        found.refused[listing.root] = f"it is a store of format {version[:20]!r}, which this Shoal does not know"
        return
    lay = Layout(Path())
    for path in _below(paths, "manifests"):
        if not path.endswith(".json") or path.rpartition("/")[2].startswith("."):
            continue
        try:
            manifest = decode(listing.texts.get(path, b""), Manifest)
            check_manifest(manifest)
            if not manifest.sealed or path != lay.manifest(manifest.repo, manifest.commit).as_posix():
                raise _NotOne(f"it is the manifest of {manifest.model}, unsealed or out of its place")
            files = tuple(_stored_file(listing, lay, f) for f in manifest.files)
        except (ShoalError, _NotOne) as e:
            found.refused[_at(listing, path)] = str(e)
            continue
        revisions = tuple(manifest.revisions)
        found.candidates.append(
            Candidate(manifest.repo, manifest.commit, revisions, listing.root, _at(listing, path), files)
        )


def _stored_file(listing: Listing, lay: Layout, file: ManifestFile) -> File:
    path = lay.blob(file.sha256).as_posix()
    entry = listing.entries.get(path)
    if entry is None or entry.kind != "file" or entry.seen.size_bytes != file.size_bytes:
        raise _NotOne(f"blob {file.sha256[:16]}… of {file.path} is not there")
    return File(file.path, _at(listing, path), entry.seen, file.sha256)


# What may be offered


def is_verified(file: File, verified: Mapping[str, Verified]) -> bool:
    """Whether a file has been hashed as it stands now, in the way that its name asks for."""
    known = verified.get(file.at)
    if known is None or known.seen != file.seen:
        return False
    return bool(known.git_sha1) or not file.expected.startswith("git-")


def is_corrupt(file: File, known: Verified) -> bool:
    """Whether a file that was hashed is not what it is called."""
    return known.rotten or file.expected not in ("", known.sha256, f"git-{known.git_sha1}")


def local_commit(files: Iterable[ManifestFile]) -> str:
    """The commit of a directory that has none: the same files under the same names have the same."""
    digest = hashlib.sha1(usedforsecurity=False)
    for f in sorted(files, key=lambda f: f.path):
        digest.update(f"{f.path}\0{f.sha256}\n".encode())
    return digest.hexdigest()


def decide(candidates: Iterable[Candidate], verified: Mapping[str, Verified]) -> Verdict:
    """Which models are offered, which wait to be hashed, which may not be: of two that are one, the first counts."""
    verdict = Verdict()
    local: dict[str, str] = {}
    for c in candidates:
        known = {f.path: verified[f.at] for f in c.files if is_verified(f, verified)}
        corrupt = [f for f in c.files if f.path in known and is_corrupt(f, known[f.path])]
        if corrupt:
            verdict.refused[c.directory] = (
                f"{corrupt[0].path} is corrupt: {corrupt[0].at} is not what its name, or an earlier look, says; "
                "bring it there anew"
            )
            verdict.corrupt |= {f.at: c.directory for f in corrupt}
            continue
        if len(known) < len(c.files):
            verdict.waiting.append(c)
            continue
        files = [
            ManifestFile(path=f.path, size_bytes=f.seen.size_bytes, sha256=known[f.path].sha256) for f in c.files
        ]
        files.sort(key=lambda f: f.path)
        manifest = Manifest(
            repo=c.repo, commit=c.commit or local_commit(files), files=files, revisions=list(c.revisions)
        )
        if not c.commit and local.setdefault(c.repo, c.directory) != c.directory:
            verdict.refused[c.directory] = f"{c.repo}@{LOCAL_REVISION} is {local[c.repo]} already"
            continue
        git = {f"git-{v.git_sha1}": v.sha256 for v in known.values() if v.git_sha1}
        adopted = Adopted(manifest, c.root, c.directory, {f.path: f for f in c.files}, git)
        verdict.adopted.setdefault(manifest.model, adopted)
    return verdict
