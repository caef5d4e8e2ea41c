"""The store's and the home's file systems. Blocks, perhaps for long on a network file system."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from shoal_cli.doctor.checks.disk import DiskFacts, FileSystemInfo
from shoal_cli.doctor.probes.local_node import LocalNode
from shoal_common.host.disk_space import nearest_existing
from shoal_common.settings.node import StorageSettings
from shoal_common.settings.values import read_valid_settings
from shoal_common.store.blob_lookup import read_volumes
from shoal_common.store.mounts import Mount, file_system_of, mounts
from shoal_common.store.store_paths import StorePaths


def probe(local: LocalNode) -> DiskFacts:
    """Return what the file systems tell; what storage publishes is added later."""
    mounted = mounts()
    layout = StorePaths(local.store)
    settings, errors = read_valid_settings(StorageSettings, local.settings, local.environ)
    return DiskFacts(
        store=file_system(local.store, mounted),
        home=file_system(local.home, mounted),
        store_exists=_exists(layout.version),
        ballast_bytes=_allocated(layout.ballast),
        settings=settings,
        settings_errors=[local.settings_error] if local.settings_error else [e.message for e in errors],
        volumes=[_volume(path, identity, mounted) for identity, path in _remembered(layout)],
        libraries=[file_system(Path(library).expanduser(), mounted) for library in settings.libraries],
    )


def file_system(path: Path, mounted: Sequence[Mount]) -> FileSystemInfo:
    """Return the file system of a path, or of the nearest directory above it that exists."""
    try:
        found = nearest_existing(path)
        nearest = found.resolve()
        s, device = os.statvfs(nearest), nearest.stat().st_dev
    except OSError as e:
        return FileSystemInfo(path=str(path), exists=False, error=e.strerror or str(e))
    return FileSystemInfo(
        path=str(path),
        exists=found == path,
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
