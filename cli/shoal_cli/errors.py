"""Failures as one line for a person: a command line that is not understood, a file this user may not use."""

from __future__ import annotations

import getpass
from pathlib import Path

import typer


def usage_message(error: typer.TyperException) -> str:
    """Return what is wrong with a command line, and which help to read."""
    close = getattr(error, "possibilities", None)
    text = f"{error.message}, did you mean {' or '.join(sorted(close))}?" if close else error.format_message()
    message = f"{text[:1].lower()}{text[1:]}".rstrip(".")
    ctx = getattr(error, "ctx", None)
    return f"{message}; see `{ctx.command_path if ctx else 'shoal'} --help`"


def permission_denied_message(error: PermissionError) -> str:
    """Return what a person reads who may not use a file: most often it is another user's node."""
    path = Path(error.filename or "/")
    owner = next((name for p in (path, *path.parents) if (name := _owner(p))), "")
    belongs_to = f", which belongs to {owner}" if owner else ""
    remedy = f"run this as {owner}, or " if owner and owner != getpass.getuser() else ""
    return f"{path}{belongs_to}: {error.strerror}; {remedy}change its permissions, or choose another --home"


def _owner(path: Path) -> str:
    try:
        return path.owner()
    except (OSError, KeyError):
        return ""
