"""Names from outside, checked once, here (invariant I10).

Nothing else in Shoal turns a foreign string into a model, a node, a file path or a key: what these functions
return may be used in paths, subjects and keys without another look.
"""

from __future__ import annotations

import re

import msgspec

from shoal_common.errors import BadName

# Hugging Face: one or two parts of up to 96 characters. A part never starts or ends with '.' or '-', and '..'
# and '--' are refused there too, which keeps `<org>--<name>` on disk free of ambiguity.
_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REVISION = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._/-]{0,126}[A-Za-z0-9_])?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NODE = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_BLOB = re.compile(r"[0-9a-f]{64}|git-[0-9a-f]{40}")
_KEY_SAFE = re.compile(r"[A-Za-z0-9_/-]")
_QUOTED = re.compile(r"=([0-9A-F]{2})")

DEFAULT_REVISION = "main"
_HOLDER_CHARACTERS = 200
LOCAL_REVISION = "local"
"""What a model is called that no hub knows, a directory of a person's own: never meant by plain `org/name`."""


class ModelRef(msgspec.Struct, frozen=True):
    """A model as people name it: `org/name`, or `org/name@revision` (a branch, a tag or a commit)."""

    repo: str
    revision: str = DEFAULT_REVISION

    @classmethod
    def parse(cls, text: str) -> ModelRef:
        """Read `org/name[@revision]`. Raises BadName, saying which part is wrong."""
        repo, at, revision = text.partition("@")
        parts = repo.split("/")
        if len(parts) != 2 or not all(_PART.fullmatch(p) and ".." not in p and "--" not in p for p in parts):
            raise BadName(
                f"{text[:200]!r} is not a model: write org/name or org/name@revision, "
                "for example mlx-community/Qwen3-0.6B-4bit"
            )
        if at and (not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision):
            raise BadName(f"{revision[:200]!r} is not a revision: give a branch, a tag or a commit")
        return cls(repo, revision if at else DEFAULT_REVISION)

    def __str__(self) -> str:
        return self.repo if self.revision == DEFAULT_REVISION else f"{self.repo}@{self.revision}"


def is_commit(revision: str) -> bool:
    """Whether a revision is a full commit and so names bytes for ever."""
    return bool(_COMMIT.fullmatch(revision))


def check_commit(text: str) -> str:
    """A 40-digit commit, or BadName."""
    if not is_commit(text):
        raise BadName(f"{text[:80]!r} is not a commit: 40 hexadecimal digits are expected")
    return text


def check_node(text: str) -> str:
    """A node id, or BadName."""
    if not _NODE.fullmatch(text):
        raise BadName(f"{text[:80]!r} is not a node id: use a-z, 0-9 and '-', at most 63 characters")
    return text


def check_id(text: str) -> str:
    """A command, instance or request id, or BadName."""
    if not _ID.fullmatch(text):
        raise BadName(f"{text[:80]!r} is not an id: use letters, digits, '-' and '_', at most 64 characters")
    return text


def check_blob(text: str) -> str:
    """A blob's name (64 hex digits of sha256; before that is known, `git-` and a git sha1), or BadName."""
    if not _BLOB.fullmatch(text):
        raise BadName(f"{text[:80]!r} is not a blob: 64 hexadecimal digits of its sha256 are expected")
    return text


def check_file_path(text: str) -> str:
    """A file's path inside a model: relative, '/'-separated, nothing that climbs or hides. Else BadName."""
    parts = text.split("/")
    hostile = (
        not text
        or len(text) > 512
        or any("\ud800" <= c <= "\udfff" for c in text)  # half a character, which no file system takes
        or any(p in ("", ".", "..") or len(p.encode()) > 255 for p in parts)
        or any(ord(c) < 32 or c in '\\:\x7f<>"|?*' for c in text)
    )
    if hostile:
        raise BadName(f"{text[:200]!r} is not a path that a model's file may have")
    return text


def check_holder(text: str) -> str:
    """Who holds a lease, in words for people, or BadName."""
    if not text.strip() or len(text) > _HOLDER_CHARACTERS or not text.isprintable():
        raise BadName(
            f"{text[:80]!r} does not say who holds a lease: one line of at most {_HOLDER_CHARACTERS} characters is "
            "expected"
        )
    return text


def node_id_from_hostname(hostname: str, suffix: str) -> str:
    """A readable node id: the host's first label, made safe, and a suffix that tells namesakes apart."""
    stem = re.sub(r"[^a-z0-9]+", "-", hostname.split(".", maxsplit=1)[0].lower()).strip("-")[:48].strip("-")
    return check_node(f"{stem or 'node'}-{suffix}")


def quote_key(text: str) -> str:
    """A name as one KV key token: '.', which separates tokens, and all that is unsafe become =XX."""
    return "".join(c if _KEY_SAFE.fullmatch(c) else "".join(f"={b:02X}" for b in c.encode()) for c in text)


def unquote_key(token: str) -> str:
    """What `quote_key` was given."""
    raw = _QUOTED.sub(lambda m: chr(int(m.group(1), 16)), token)
    return raw.encode("latin-1").decode()
