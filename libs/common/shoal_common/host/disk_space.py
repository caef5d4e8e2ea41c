"""The file system under a path: its device, and what it has free. Blocking."""

from __future__ import annotations

import os
from pathlib import Path


def nearest_existing(path: Path) -> Path:
    """Return the path, or the nearest directory above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def device_of(path: Path) -> int:
    """Return the device of the file system that holds a path, or would."""
    return nearest_existing(path).stat().st_dev


def free_bytes_of(directory: Path) -> int:
    """Return what a file system has available; 0 also if it has no inode left."""
    s = os.statvfs(directory)
    return 0 if s.f_files > 0 and s.f_favail == 0 else s.f_bavail * s.f_frsize
