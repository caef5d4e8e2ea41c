"""Owners and modes of what is in the home. Blocks."""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

from shoal_cli.doctor.checks.permissions import PathPermission, PermissionFacts
from shoal_cli.doctor.probes.local_node import LocalNode
from shoal_cli.node_home import Home
from shoal_common.host.private_files import private_paths
from shoal_common.store.store_paths import StorePaths


def probe(local: LocalNode) -> PermissionFacts:
    """Return the owners and modes of the home, the store, and the files with secrets."""
    home, user = Home(local.home), _user(os.geteuid())
    try:
        list(home.root.iterdir())
    except FileNotFoundError:
        parent = next((p for p in home.root.parents if p.exists()), Path("/"))
        return PermissionFacts(home=str(home.root), user=user, creatable=os.access(parent, os.W_OK | os.X_OK))
    except OSError as e:
        reason = e.strerror or str(e)
        return PermissionFacts(home=str(home.root), user=user, owner=_owner(home.root), read_error=reason)
    entries = [entry for path, private in _paths(home, local.store) for entry in _entry(path, private)]
    return PermissionFacts(home=str(home.root), user=user, owner=_owner(home.root), entries=entries)


def _paths(home: Home, store: Path) -> Iterator[tuple[Path, bool]]:
    layout = StorePaths(store)
    for path in (home.root, *private_paths(home.root), store):
        yield path, True
    for path in (layout.lock, layout.blobs, layout.partials, layout.manifests, layout.views, layout.tombstones):
        yield path, False


def _entry(path: Path, private: bool) -> list[PathPermission]:
    """Return nothing for what does not exist, or may not be seen."""
    try:
        found = path.stat()
    except OSError:
        return []
    needed = os.W_OK | (os.X_OK if stat.S_ISDIR(found.st_mode) else 0)
    writable = os.access(path, needed)
    mode, owner = stat.S_IMODE(found.st_mode), _user(found.st_uid)
    return [PathPermission(path=str(path), mode=mode, owner=owner, private=private, writable=writable)]


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
