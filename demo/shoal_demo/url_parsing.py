"""Parse request paths; the only place that handles untrusted names.

The path is split before it is unquoted, because clients quote the slashes of a revision or a folder. Only `model`
becomes a path on the disk, and its form is checked; files are looked up in the listing of a repository.
"""

import re
from dataclasses import dataclass
from urllib.parse import unquote

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

DEFAULT_REVISION = "main"


@dataclass(frozen=True)
class ListTarget:
    """All models."""


@dataclass(frozen=True)
class InfoTarget:
    """The metadata of a model at a revision."""

    model: str
    revision: str


@dataclass(frozen=True)
class TreeTarget:
    """The files of a model at a revision, under a folder ("": all)."""

    model: str
    revision: str
    folder: str


@dataclass(frozen=True)
class FileTarget:
    """One file of a model at a revision."""

    model: str
    revision: str
    path: str


@dataclass(frozen=True)
class LfsTarget:
    """The bytes of a large file, by their hash."""

    sha256: str


Target = ListTarget | InfoTarget | TreeTarget | FileTarget | LfsTarget


def is_model(model: str) -> bool:
    """Return whether `model` has the form org/name and is safe as a path on the disk."""
    parts = model.split("/")
    return len(parts) == 2 and all(_NAME.fullmatch(part) and ".." not in part for part in parts)


def parse_target(raw_path: str) -> Target | None:
    """Return the target of a raw request path; None for an unknown route."""
    target: InfoTarget | TreeTarget | FileTarget | None = None
    match [unquote(segment) for segment in raw_path.strip("/").split("/")]:
        case ["api", "models"]:
            return ListTarget()
        case ["api", "models", org, name]:
            target = InfoTarget(f"{org}/{name}", DEFAULT_REVISION)
        case ["api", "models", org, name, "revision", revision]:
            target = InfoTarget(f"{org}/{name}", revision)
        case ["api", "models", org, name, "tree", revision, *folder]:
            target = TreeTarget(f"{org}/{name}", revision, "/".join(folder).strip("/"))
        case ["_lfs", sha256]:
            return LfsTarget(sha256) if _SHA256.fullmatch(sha256) else None
        case [org, name, "resolve", revision, *path] if path:
            target = FileTarget(f"{org}/{name}", revision, "/".join(path))
    return target if target is not None and is_model(target.model) else None
