"""Recognise models in the listing of a library: a Hugging Face cache, a store, plain directories. Pure."""

from __future__ import annotations

import posixpath
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from shoal_common.errors import BadName, ShoalError
from shoal_common.messages import DECODE_ERRORS, decode
from shoal_common.messages.manifest import Manifest, ManifestFile, content_commit
from shoal_common.names import LOCAL_REVISION, ModelId, ModelRef, check_commit, check_file_path
from shoal_common.store.store_paths import FORMAT_VERSION, NAMES_WITH_CASE_VERSION, StorePaths, old_manifest_path
from shoal_storage.admission.manifest_check import check_manifest
from shoal_storage.ledger.library_model import FileStat, LibraryFile, LibraryModel, VerifiedFile

MAX_DEPTH = 16
CONFIG = "config.json"
WEIGHTS_SUFFIX = ".safetensors"
_HF_PREFIX = "models--"
_HF_DIRECTORIES = ("refs", "snapshots", "blobs")
_NON_MODEL_PREFIXES = ("datasets--", "spaces--", ".")
_WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".npz", ".bin", ".pt", ".pth")
_INDEX_SUFFIX = ".safetensors.index.json"
_HF_PARTIAL_SUFFIX = ".incomplete"
_SHARD = re.compile(rf"(.+)-[0-9]{{5}}-of-([0-9]{{5}})({'|'.join(map(re.escape, _WEIGHT_SUFFIXES))})")
_MAX_SHARDS = 4000
_BOM = b"\xef\xbb\xbf"
"""Editors on Windows write it before the JSON, which is right all the same."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")


class DirEntry(msgspec.Struct, frozen=True):
    """An entry in a library. `target` is a symbolic link's text, unresolved."""

    kind: Literal["file", "directory", "link", "other"]
    stat: FileStat = FileStat(0, 0, 0)
    target: str = ""


class LibraryListing(msgspec.Struct):
    """The contents of a library, by path relative to it, and the text of the small files that describe others."""

    path: str
    entries: dict[str, DirEntry] = {}
    texts: dict[str, bytes] = {}
    unreadable: dict[str, str] = {}
    """Directories that cannot be listed, with the error."""
    unusable_weights: dict[str, str] = {}
    """Safetensors files that are truncated or none at all, with the reason; links included."""


class ModelCandidate(msgspec.Struct, frozen=True):
    """A model in a library before hashing. `commit` is "" if it is derived from the content."""

    repo: str
    commit: str
    revisions: tuple[str, ...]
    library: str
    directory: str
    files: tuple[LibraryFile, ...]


class RecognizedModels(msgspec.Struct):
    """The models of a library, and the reason for each directory that looks like a model but is not usable."""

    candidates: list[ModelCandidate] = []
    refused: dict[str, str] = {}


class AcceptanceResult(msgspec.Struct):
    """Which library models are offered, wait for hashing, or are refused."""

    accepted: dict[ModelId, LibraryModel] = {}
    """By `org/name@commit`."""
    waiting: list[ModelCandidate] = []
    refused: dict[str, str] = {}
    corrupt: dict[str, str] = {}
    """Corrupt files of refused models, by path, with the model's directory."""


class _NotAModel(Exception):
    """A directory is not a usable model; the message says why."""


def is_store(top_names: Iterable[str]) -> bool:
    """Return whether the names at the top of a library are those of a Shoal store."""
    return {"VERSION", "manifests", "blobs"} <= set(top_names)


def may_contain_models(parts: tuple[str, ...], store: bool) -> bool:
    """Return whether a directory, given as the parts of its path, is worth listing."""
    if len(parts) > MAX_DEPTH:
        return False
    if store:
        return parts[0] == "manifests" or parts[:2] in (("blobs",), ("blobs", "sha256"))
    if parts[0].startswith(_HF_PREFIX):
        return len(parts) == 1 or parts[1] in _HF_DIRECTORIES
    return not parts[0].startswith(_NON_MODEL_PREFIXES) and not any(p.startswith(".") for p in parts)


def describes_files(path: str, store: bool) -> bool:
    """Return whether a file describes others, so that its text is needed."""
    parts = path.split("/")
    if store:
        return path == "VERSION" or (parts[0] == "manifests" and path.endswith(".json"))
    if parts[0].startswith(_HF_PREFIX):
        return parts[1:2] == ["refs"] or (parts[1:2] == ["snapshots"] and path.endswith(_INDEX_SUFFIX))
    return path.endswith(_INDEX_SUFFIX)


def resolve_cache_link(path: str, target: str, library: str) -> str | None:
    """Return the blob in the same model of a Hugging Face cache that a link points to, as a library path, or None."""
    top = path.split("/", 1)[0]
    if target.startswith(f"{library}/"):
        target = f"/{target.removeprefix(library)}"
        resolved = posixpath.normpath(target).lstrip("/")
    else:
        resolved = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
    parts = resolved.split("/")
    return resolved if top.startswith(_HF_PREFIX) and len(parts) == 3 and parts[:2] == [top, "blobs"] else None


def recognize(listing: LibraryListing) -> RecognizedModels:
    """Return the models of a library, in order of their directories."""
    paths = sorted(listing.entries)
    result = RecognizedModels()
    top_names = [p for p in paths if "/" not in p]
    for path, error in listing.unreadable.items():
        result.refused[_absolute(listing, path)] = f"it cannot be listed: {error}"
    if is_store(top_names):
        _read_store(listing, paths, result)
        return result
    for name in top_names:
        if name.startswith(_HF_PREFIX):
            _read_hf_cache(listing, paths, name, result)
        elif not name.startswith(_NON_MODEL_PREFIXES) and listing.entries[name].kind == "directory":
            for path in _below(paths, name):
                if path.count("/") == 1:
                    _read_plain(listing, paths, path, result)
    return result


def _absolute(listing: LibraryListing, path: str) -> str:
    return f"{listing.path.rstrip('/')}/{path}"


def _below(paths: list[str], directory: str) -> list[str]:
    """Return the paths below a directory, of sorted paths ("0" is the character after "/")."""
    return paths[bisect_left(paths, f"{directory}/") : bisect_left(paths, f"{directory}0")]


def _read_hf_cache(listing: LibraryListing, paths: list[str], top: str, result: RecognizedModels) -> None:
    entry = listing.entries[top]
    repo = top.removeprefix(_HF_PREFIX).replace("--", "/")
    try:
        if entry.kind == "link":
            raise _NotAModel(f"it is a link to {entry.target[:200]}: add that directory as a library of its own")
        if entry.kind != "directory":
            return
        if ModelRef.parse(repo).repo != repo:
            raise _NotAModel("its name is not a model name, org/name")
    except (BadName, _NotAModel) as e:
        result.refused[_absolute(listing, top)] = str(e)
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
                result.refused[_absolute(listing, path)] = str(e)
    for snapshot in _below(paths, f"{top}/snapshots"):
        if snapshot.count("/") == 2 and listing.entries[snapshot].kind == "directory":
            try:
                commit = check_commit(snapshot.rpartition("/")[2])
                files = _snapshot_files(listing, paths, snapshot)
                _require_complete(listing, snapshot, files)
            except (BadName, _NotAModel) as e:
                result.refused[_absolute(listing, snapshot)] = str(e)
                continue
            names = tuple(sorted(revisions.get(commit, [])))
            result.candidates.append(
                ModelCandidate(repo, commit, names, listing.path, _absolute(listing, snapshot), tuple(files))
            )


def _snapshot_files(listing: LibraryListing, paths: list[str], snapshot: str) -> list[LibraryFile]:
    files = []
    for path in _below(paths, snapshot):
        entry, expected, source = listing.entries[path], "", path
        if entry.kind == "directory":
            continue
        name = check_file_path(path.removeprefix(f"{snapshot}/"))
        if entry.kind == "link":
            blob = resolve_cache_link(path, entry.target, listing.path)
            if blob is None:
                raise _NotAModel(f"{name} links outside of the cache's blobs/, to {entry.target[:200]}")
            if blob not in listing.entries:
                partial = f"{blob}{_HF_PARTIAL_SUFFIX}" in listing.entries
                raise _NotAModel(f"{name} is missing{': its download is incomplete' if partial else ''}")
            source, entry = blob, listing.entries[blob]
            etag = blob.rpartition("/")[2]
            expected = etag if _SHA256.fullmatch(etag) else f"git-{etag}" if _SHA1.fullmatch(etag) else ""
        if entry.kind != "file":
            raise _NotAModel(f"{name} is not a file")
        files.append(LibraryFile(name, _absolute(listing, source), entry.stat, expected))
    return files


def _require_complete(listing: LibraryListing, directory: str, files: Iterable[LibraryFile]) -> None:
    """Refuse an incomplete model: a node that took it for complete would never download the rest."""
    names = {f.path for f in files}
    if not any(n.endswith(_WEIGHT_SUFFIXES) for n in names):
        raise _NotAModel("it has no weights")
    if CONFIG not in names and any(n.endswith(WEIGHTS_SUFFIX) for n in names):
        raise _NotAModel(f"it is incomplete: {CONFIG} is missing")
    for name in sorted(names):
        if reason := listing.unusable_weights.get(f"{directory}/{name}"):
            raise _NotAModel(reason)
        for other in _required_with(name, listing.texts.get(f"{directory}/{name}", b"")):
            if posixpath.join(posixpath.dirname(name), other) not in names:
                raise _NotAModel(f"it is incomplete: {other[:200]}, which {name} names, is missing")


def _required_with(name: str, text: bytes) -> list[str]:
    """Return the files beside this one that the model needs because it has this one, in order."""
    if name.endswith(_INDEX_SUFFIX):
        try:
            return sorted(set(msgspec.json.decode(text.removeprefix(_BOM), type=_Index).weight_map.values()))
        except DECODE_ERRORS as e:
            raise _NotAModel(f"{name} cannot be read, so what belongs to the model is not known: {e}") from None
    if shard := _SHARD.fullmatch(posixpath.basename(name)):
        stem, count, suffix = shard[1], shard[2], shard[3]
        return [f"{stem}-{i:05}-of-{count}{suffix}" for i in range(1, min(int(count), _MAX_SHARDS) + 1)]
    return []


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _read_plain(listing: LibraryListing, paths: list[str], directory: str, result: RecognizedModels) -> None:
    entries = listing.entries
    if entries[directory].kind != "directory" or f"{directory}/{CONFIG}" not in entries:
        return
    paths_below = _below(paths, directory)
    if not any(p.endswith(_WEIGHT_SUFFIXES) for p in paths_below):
        return
    files = []
    try:
        if ModelRef.parse(directory).repo != directory:
            raise _NotAModel("its name is not a model name, org/name")
        for path in paths_below:
            name = path.removeprefix(f"{directory}/")
            # Hidden files belong to downloaders and editors, not to the model.
            if any(part.startswith(".") for part in name.split("/")) or entries[path].kind == "directory":
                continue
            check_file_path(name)
            if entries[path].kind != "file":
                raise _NotAModel(f"{name} is not a file" + (" but a link" if entries[path].kind == "link" else ""))
            files.append(LibraryFile(name, _absolute(listing, path), entries[path].stat))
        _require_complete(listing, directory, files)
    except (BadName, _NotAModel) as e:
        result.refused[_absolute(listing, directory)] = str(e)
        return
    absolute = _absolute(listing, directory)
    result.candidates.append(ModelCandidate(directory, "", (LOCAL_REVISION,), listing.path, absolute, tuple(files)))


def _read_store(listing: LibraryListing, paths: list[str], result: RecognizedModels) -> None:
    version = listing.texts.get("VERSION", b"").decode(errors="replace").strip()
    if version not in (FORMAT_VERSION, NAMES_WITH_CASE_VERSION):
        result.refused[listing.path] = f"it is a store of format {version[:20]!r}: update Shoal"
        return
    store_paths = StorePaths(Path())
    for path in _below(paths, "manifests"):
        if not path.endswith(".json") or path.rpartition("/")[2].startswith("."):
            continue
        try:
            manifest = decode(listing.texts.get(path, b""), Manifest)
            check_manifest(manifest)
            is_old = version == NAMES_WITH_CASE_VERSION
            place = old_manifest_path(manifest.model) if is_old else f"{store_paths.manifest(manifest.model)}"
            if not manifest.sealed or path != place:
                raise _NotAModel(f"it is the manifest of {manifest.model}, unsealed or misplaced")
            files = tuple(_stored_file(listing, store_paths, f) for f in manifest.files)
        except (ShoalError, _NotAModel) as e:
            result.refused[_absolute(listing, path)] = str(e)
            continue
        revisions = tuple(manifest.revisions)
        result.candidates.append(
            ModelCandidate(manifest.repo, manifest.commit, revisions, listing.path, _absolute(listing, path), files)
        )


def _stored_file(listing: LibraryListing, store_paths: StorePaths, file: ManifestFile) -> LibraryFile:
    path = store_paths.blob(file.sha256).as_posix()
    entry = listing.entries.get(path)
    if entry is None or entry.kind != "file" or entry.stat.size_bytes != file.size_bytes:
        raise _NotAModel(f"blob {file.sha256[:16]}… of {file.path} is missing")
    return LibraryFile(file.path, _absolute(listing, path), entry.stat, file.sha256)


def is_verified(file: LibraryFile, verified: Mapping[str, VerifiedFile]) -> bool:
    """Return whether a file was hashed since it last changed, with the kind of hash that its name needs."""
    known = verified.get(file.absolute_path)
    if known is None or known.stat != file.stat:
        return False
    return bool(known.git_sha1) or not file.expected_hash.startswith("git-")


def is_corrupt(file: LibraryFile, known: VerifiedFile) -> bool:
    """Return whether a hashed file does not match its expected hash or an earlier one."""
    return known.corrupt or file.expected_hash not in ("", known.sha256, f"git-{known.git_sha1}")


def accept_models(candidates: Iterable[ModelCandidate], verified: Mapping[str, VerifiedFile]) -> AcceptanceResult:
    """Decide which models are offered, wait for hashing or are refused; of two copies of a model the first counts."""
    acceptance = AcceptanceResult()
    local_directories: dict[str, str] = {}
    for c in candidates:
        known = {f.path: verified[f.absolute_path] for f in c.files if is_verified(f, verified)}
        corrupt = [f for f in c.files if f.path in known and is_corrupt(f, known[f.path])]
        if corrupt:
            acceptance.refused[c.directory] = (
                f"{corrupt[0].path} is corrupt: the hash of {corrupt[0].absolute_path} differs from its name or "
                "from an earlier "
                "hash; download it there again"
            )
            acceptance.corrupt |= {f.absolute_path: c.directory for f in corrupt}
            continue
        if len(known) < len(c.files):
            acceptance.waiting.append(c)
            continue
        files = [
            ManifestFile(path=f.path, size_bytes=f.stat.size_bytes, sha256=known[f.path].sha256) for f in c.files
        ]
        files.sort(key=lambda f: f.path)
        manifest = Manifest(
            repo=c.repo, commit=c.commit or content_commit(files), files=files, revisions=list(c.revisions)
        )
        if not c.commit and local_directories.setdefault(c.repo, c.directory) != c.directory:
            acceptance.refused[c.directory] = f"{c.repo}@{LOCAL_REVISION} is taken by {local_directories[c.repo]}"
            continue
        git = {f"git-{v.git_sha1}": v.sha256 for v in known.values() if v.git_sha1}
        library_model = LibraryModel(manifest, c.library, c.directory, {f.path: f for f in c.files}, git)
        acceptance.accepted.setdefault(manifest.model, library_model)
    return acceptance
