"""Owners and modes of what is in the home. Blocks."""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

from shoal_cli.doctor.look.here import Here
from shoal_cli.doctor.permissions import Entry, PermissionFacts
from shoal_cli.home import Home
from shoal_common.layout import Layout


def look(here: Here) -> PermissionFacts:
    """What the file system says of the home, the store, and the files with secrets."""
    home, me = Home(here.home), _user(os.geteuid())
    try:
        list(home.root.iterdir())
    except FileNotFoundError:
        above = next((p for p in home.root.parents if p.exists()), Path("/"))
        return PermissionFacts(home=str(home.root), me=me, creatable=os.access(above, os.W_OK | os.X_OK))
    except OSError as e:
        return PermissionFacts(home=str(home.root), me=me, owner=_owner(home.root), unreadable=e.strerror or str(e))
    entries = [found for path, private in _paths(home, here.store) for found in _entry(path, private)]
    return PermissionFacts(home=str(home.root), me=me, owner=_owner(home.root), entries=entries)


def _paths(home: Home, store: Path) -> Iterator[tuple[Path, bool]]:
    layout = Layout(store)
    yield home.root, False
    yield home.run, True
    for name in ("secret", "chat_history", "environment", "environment.fetcher", "nats-server.conf"):
        yield home.root / name, True
    for path in (home.root / "node.toml", home.logs, home.nats_store, store):
        yield path, False
    for path in (layout.lock, layout.blobs, layout.partials, layout.manifests, layout.views, layout.tombs):
        yield path, False


def _entry(path: Path, private: bool) -> list[Entry]:
    """None where it is not there, or may not be seen."""
    try:
        found = path.stat()
    except OSError:
        return []
    wish = os.W_OK | (os.X_OK if stat.S_ISDIR(found.st_mode) else 0)
    may = os.access(path, wish)
    mode, owner = stat.S_IMODE(found.st_mode), _user(found.st_uid)
    return [Entry(path=str(path), mode=mode, owner=owner, private=private, writable=may)]


def _owner(path: Path) -> str:
    try:
        return _user(path.stat().st_uid)
    except OSError:
        return ""


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
