"""Names from outside, checked here (I10).

Nothing else in Shoal turns a foreign string into a model, node, file path or key: what these functions return is safe
in paths, subjects and keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import SequenceMatcher
from typing import NewType

import msgspec

from shoal_common.errors import BadName, NotFound

SERVICES = ("storage", "fetcher", "fileserver", "placement", "inference", "gateway")

# Hugging Face: one or two parts of up to 96 characters. A part never starts or ends with '.' or '-', and contains
# neither '..' nor '--', which keeps `<org>--<name>` on disk unambiguous.
_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_MAX_REPO_CHARACTERS = 200
"""Twice for each capital, as in names on disk, which have at most 255 bytes. The hub allows 96 in all."""
_CAPITALS = re.compile(r"[A-Z]")
_REVISION = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._/-]{0,126}[A-Za-z0-9_])?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NODE = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_BLOB = re.compile(r"[0-9a-f]{64}|git-[0-9a-f]{40}")
_KEY_SAFE = re.compile(r"[A-Za-z0-9_/-]")

DEFAULT_REVISION = "main"
_MAX_HOLDER_CHARACTERS = 200
LOCAL_REVISION = "local"
"""Revision of a model that no hub knows, such as a person's own directory; plain `org/name` never means it."""


ModelId = NewType("ModelId", str)
"""A model at a commit, `org/name@commit`: the one name that never changes its meaning.

A str on the wire, in keys and in dictionaries. No class of its own: msgspec does not encode a subclass of str, and a
custom type takes a hook wherever something is encoded or decoded, and 2.7 times as long for a map of 5,000 models.
"""


def model_id(repo: str, commit: str) -> ModelId:
    """Return the id of a repo at a commit."""
    return ModelId(f"{repo}@{commit}")


def repo_of(model: ModelId) -> str:
    """Return `org/name` of a model."""
    return model.rpartition("@")[0]


def commit_of(model: ModelId) -> str:
    """Return the commit of a model."""
    return model.rpartition("@")[2]


def check_model_id(text: str) -> ModelId:
    """Return `org/name@commit`. Raises BadName."""
    ref = ModelRef.parse(text)
    return model_id(ref.repo, check_commit(ref.revision))


class ModelRef(msgspec.Struct, frozen=True):
    """A model as people name it: `org/name`, or `org/name@revision` (a branch, a tag or a commit)."""

    repo: str
    revision: str = DEFAULT_REVISION

    @classmethod
    def parse(cls, text: str) -> ModelRef:
        """Parse `org/name[@revision]`. Raises BadName, which names the wrong part."""
        repo, at, revision = text.partition("@")
        parts = repo.split("/")
        if len(parts) != 2 or not all(_PART.fullmatch(p) and ".." not in p and "--" not in p for p in parts):
            raise BadName(
                f"{text[:200]!r} is not a model: write org/name or org/name@revision, "
                "for example mlx-community/Qwen3-0.6B-4bit"
            )
        if len(repo) + len(_CAPITALS.findall(repo)) > _MAX_REPO_CHARACTERS:
            raise BadName(
                f"{repo[:80]!r}… is longer than the name of a model: at most {_MAX_REPO_CHARACTERS} characters"
            )
        if at and (not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision):
            raise BadName(f"{revision[:200]!r} is not a revision: give a branch, a tag or a commit")
        return cls(repo, revision if at else DEFAULT_REVISION)

    def __str__(self) -> str:
        return self.repo if self.revision == DEFAULT_REVISION else f"{self.repo}@{self.revision}"


def is_commit(revision: str) -> bool:
    """Return whether a revision is a full commit, which names the same bytes for ever."""
    return bool(_COMMIT.fullmatch(revision))


def check_commit(text: str) -> str:
    """Return a 40-digit commit. Raises BadName."""
    if not is_commit(text):
        raise BadName(f"{text[:80]!r} is not a commit: 40 hexadecimal digits are expected")
    return text


def check_node(text: str) -> str:
    """Return a node id. Raises BadName."""
    if not _NODE.fullmatch(text):
        raise BadName(f"{text[:80]!r} is not a node id: use a-z, 0-9 and '-', at most 63 characters")
    return text


def check_id(text: str) -> str:
    """Return a command, instance or request id. Raises BadName."""
    if not _ID.fullmatch(text):
        raise BadName(f"{text[:80]!r} is not an id: use letters, digits, '-' and '_', at most 64 characters")
    return text


def check_blob(text: str) -> str:
    """Return a blob's name: its sha256, or `git-` and git's sha1 while that is unknown. Raises BadName."""
    if not _BLOB.fullmatch(text):
        raise BadName(f"{text[:80]!r} is not a blob: 64 hexadecimal digits of its sha256 are expected")
    return text


def check_file_path(text: str) -> str:
    """Return a file's path inside a model: relative, '/'-separated, without `..`. Raises BadName."""
    parts = text.split("/")
    hostile = (
        not text
        or len(text) > 512
        or any("\ud800" <= c <= "\udfff" for c in text)  # half a surrogate pair, which no file system accepts
        or any(p in ("", ".", "..") or len(p.encode()) > 255 for p in parts)
        or any(ord(c) < 32 or c in '\\:\x7f<>"|?*' for c in text)
    )
    if hostile:
        raise BadName(f"{text[:200]!r} is not a valid path of a model's file")
    return text


def check_holder(text: str) -> str:
    """Return the name of a lease's holder, one printable line. Raises BadName."""
    if not text.strip() or len(text) > _MAX_HOLDER_CHARACTERS or not text.isprintable():
        raise BadName(
            f"{text[:80]!r} does not say who holds the lease: write one line of at most {_MAX_HOLDER_CHARACTERS} "
            "characters"
        )
    return text


def node_id_from_hostname(hostname: str, suffix: str) -> str:
    """Return a readable node id: the host's first label, made safe, and a suffix that keeps it unique."""
    stem = re.sub(r"[^a-z0-9]+", "-", hostname.split(".", maxsplit=1)[0].lower()).strip("-")[:48].strip("-")
    return check_node(f"{stem or 'node'}-{suffix}")


def quote_key(text: str) -> str:
    """Return a name as one token of a KV key: '.', which separates tokens, and unsafe characters become =XX."""
    return "".join(c if _KEY_SAFE.fullmatch(c) else "".join(f"={b:02X}" for b in c.encode()) for c in text)


_MIN_LIKENESS = 0.6
_MAX_NEAREST = 3


def nearest_names(text: str, known: Iterable[str]) -> list[str]:
    """Return up to three known names that may have been meant, the likeliest first. Case and a missing org are no
    difference; a name that contains the text is near."""
    likeness = {name: _likeness(text.lower(), name.lower()) for name in known}
    near = sorted(
        (name for name, value in likeness.items() if value >= _MIN_LIKENESS), key=lambda n: (-likeness[n], n)
    )
    return near[:_MAX_NEAREST]


def _likeness(text: str, name: str) -> float:
    if text and text in name:
        return 1.0
    return max(SequenceMatcher(None, text, part).ratio() for part in (name, name.rpartition("/")[2]))


def unknown_name(kind: str, text: str, known: Iterable[str], remedy: str = "") -> NotFound:
    """Return the error for a name that nothing has: `no model named …: did you mean …?`, else `remedy`."""
    near = nearest_names(text, known)
    hint = f"did you mean {' or '.join(near)}?" if near else remedy
    return NotFound(f"no {kind} named {text[:200]}" + (f": {hint}" if hint else ""), nearest=near)
