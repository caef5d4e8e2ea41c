"""The store's and the home's file systems, as they are now. Blocks, on a network's file system perhaps for long."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from shoal_cli.doctor.disk import DEFAULT_HEADROOM_BYTES, DEFAULT_RESERVE_BYTES, DiskFacts, FileSystem
from shoal_cli.doctor.look.here import Here
from shoal_common.blobs import further_roots
from shoal_common.filesystem import Mount, kind_of, mounts
from shoal_common.layout import Layout


def look(here: Here) -> DiskFacts:
    """All that the file systems say; what storage says, the cluster adds."""
    mounted = mounts()
    layout = Layout(here.store)
    store = file_system(here.store, mounted)
    section = here.settings.get("storage", {})
    section = section if isinstance(section, dict) else {}
    roots, error = _read_only_roots(section, here.environ)
    return DiskFacts(
        store=store,
        home=file_system(here.home, mounted),
        made=_exists(layout.version),
        reserve_bytes=_held(layout.reserve),
        reserve_wanted_bytes=_number("reserve_bytes", section, here.environ, DEFAULT_RESERVE_BYTES),
        headroom_bytes=_number("headroom_bytes", section, here.environ, DEFAULT_HEADROOM_BYTES),
        settings_error=here.settings_error or error,
        further=[_further(path, identity, mounted) for identity, path in _remembered(layout)],
        read_only_roots=[file_system(Path(r).expanduser(), mounted) for r in roots],
    )


def file_system(path: Path, mounted: Sequence[Mount]) -> FileSystem:
    """That of a path; of the nearest directory above it where it is not there."""
    there, at = True, path
    try:
        while not at.exists() and at != at.parent:
            there, at = False, at.parent
        at = at.resolve()
        s, device = os.statvfs(at), at.stat().st_dev
    except OSError as e:
        return FileSystem(path=str(path), there=False, error=e.strerror or str(e))
    return FileSystem(
        path=str(path),
        there=there,
        kind=kind_of(at, mounted),
        device=device,
        read_only=bool(s.f_flag & os.ST_RDONLY),
        free_bytes=s.f_bavail * s.f_frsize,
        total_bytes=s.f_blocks * s.f_frsize,
        inodes_free=s.f_favail,
        inodes_total=s.f_files,
    )


def _further(path: Path, identity: str, mounted: Sequence[Mount]) -> FileSystem:
    found = file_system(path, mounted)
    if not found.there:
        return found
    try:
        words = Layout(path).version.read_text().split()
    except OSError:
        words = []
    if identity in words:
        return found
    why = "its disk is not mounted" if not words else "another root is mounted there"
    return msgspec.structs.replace(found, there=False, error=why)


def _remembered(layout: Layout) -> list[tuple[str, Path]]:
    try:
        return list(further_roots(layout))
    except OSError:
        return []


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _held(path: Path) -> int:
    """What giving the reserve up would give back."""
    try:
        found = path.stat()
    except OSError:
        return 0
    return min(found.st_size, found.st_blocks * 512)


def _number(name: str, section: Mapping[str, Any], environ: Mapping[str, str], default: int) -> int:
    """A setting as storage reads it. What is no number is storage's to complain of: it does not start with it."""
    value = environ.get(f"SHOAL_{name.upper()}") or section.get(name)
    text = str(value)
    return int(text) if value is not None and text.isascii() and text.isdigit() else default


def _read_only_roots(section: Mapping[str, Any], environ: Mapping[str, str]) -> tuple[list[str], str]:
    stated = environ.get("SHOAL_READ_ONLY_ROOTS")
    roots = [r for r in stated.split(":") if r] if stated else section.get("read_only_roots", [])
    if not isinstance(roots, list) or not all(isinstance(r, str) for r in roots):
        return [], f"storage.read_only_roots in node.toml is {roots!r}: a list of directories is expected"
    return roots, ""
