"""The store's and the home's file systems. Blocks, perhaps for long on a network file system."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from shoal_cli.doctor.checks.disk import DEFAULT_BALLAST_BYTES, DEFAULT_HEADROOM_BYTES, DiskFacts, FileSystemInfo
from shoal_cli.doctor.probes.local_node import LocalNode
from shoal_common.store.blob_lookup import read_volumes
from shoal_common.store.mounts import Mount, file_system_of, mounts
from shoal_common.store.store_paths import StorePaths


def probe(local: LocalNode) -> DiskFacts:
    """Return what the file systems tell; what storage publishes is added later."""
    mounted = mounts()
    layout = StorePaths(local.store)
    section = local.settings.get("storage", {})
    section = section if isinstance(section, dict) else {}
    libraries, error = _libraries(section, local.environ)
    return DiskFacts(
        store=file_system(local.store, mounted),
        home=file_system(local.home, mounted),
        store_exists=_exists(layout.version),
        ballast_bytes=_allocated(layout.ballast),
        ballast_target_bytes=_number("ballast_bytes", section, local.environ, DEFAULT_BALLAST_BYTES),
        headroom_bytes=_number("headroom_bytes", section, local.environ, DEFAULT_HEADROOM_BYTES),
        settings_error=local.settings_error or error,
        volumes=[_volume(path, identity, mounted) for identity, path in _remembered(layout)],
        libraries=[file_system(Path(library).expanduser(), mounted) for library in libraries],
    )


def file_system(path: Path, mounted: Sequence[Mount]) -> FileSystemInfo:
    """Return the file system of a path, or of the nearest directory above it that exists."""
    exists, nearest = True, path
    try:
        while not nearest.exists() and nearest != nearest.parent:
            exists, nearest = False, nearest.parent
        nearest = nearest.resolve()
        s, device = os.statvfs(nearest), nearest.stat().st_dev
    except OSError as e:
        return FileSystemInfo(path=str(path), exists=False, error=e.strerror or str(e))
    return FileSystemInfo(
        path=str(path),
        exists=exists,
        kind=file_system_of(nearest, mounted),
        device=device,
        read_only=bool(s.f_flag & os.ST_RDONLY),
        free_bytes=s.f_bavail * s.f_frsize,
        total_bytes=s.f_blocks * s.f_frsize,
        inodes_free=s.f_favail,
        inodes_total=s.f_files,
    )


def _volume(path: Path, identity: str, mounted: Sequence[Mount]) -> FileSystemInfo:
    info = file_system(path, mounted)
    if not info.exists:
        return info
    try:
        tokens = StorePaths(path).version.read_text().split()
    except OSError:
        tokens = []
    if identity in tokens:
        return info
    reason = "its disk is not mounted" if not tokens else "another volume is mounted there"
    return msgspec.structs.replace(info, exists=False, error=reason)


def _remembered(layout: StorePaths) -> list[tuple[str, Path]]:
    try:
        return list(read_volumes(layout))
    except OSError:
        return []


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _allocated(path: Path) -> int:
    """Return what deleting a file would free."""
    try:
        stat = path.stat()
    except OSError:
        return 0
    return min(stat.st_size, stat.st_blocks * 512)


def _number(name: str, section: Mapping[str, Any], environ: Mapping[str, str], default: int) -> int:
    """Return a setting as storage reads it. An invalid one is storage's to report: it does not start with it."""
    value = environ.get(f"SHOAL_{name.upper()}") or section.get(name)
    text = str(value)
    return int(text) if value is not None and text.isascii() and text.isdigit() else default


def _libraries(section: Mapping[str, Any], environ: Mapping[str, str]) -> tuple[list[str], str]:
    """Return the libraries, and what is wrong with the setting."""
    setting = environ.get("SHOAL_LIBRARIES")
    paths = [p for p in setting.split(":") if p] if setting else section.get("libraries", [])
    if not isinstance(paths, list) or not all(isinstance(p, str) for p in paths):
        return [], f"storage.libraries in node.toml is {paths!r}: it must be a list of directories"
    return paths, ""
