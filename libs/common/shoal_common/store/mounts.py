"""Mounted file systems, and the check that a store is not on a network file system, whose locks do not hold."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec
import psutil

from shoal_common.errors import Unsupported

NETWORK_FILE_SYSTEMS = frozenset({"9p", "afpfs", "cifs", "fuse.sshfs", "lustre", "nfs", "nfs4", "smb3", "smbfs"})
"""File systems on which flock(2) is local to one machine, or always succeeds."""


class Mount(msgspec.Struct, frozen=True):
    """A mounted file system."""

    mount_point: Path
    kind: str


def mounts() -> list[Mount]:
    """Return the file systems mounted on this machine."""
    return [Mount(Path(p.mountpoint), p.fstype) for p in psutil.disk_partitions(all=True)]


def file_system_of(root: Path, mounted: Iterable[Mount]) -> str:
    """Return the type of the file system that holds an absolute path: that of the deepest mount above it, and of
    several at one place the last. "" if unknown.
    """
    above = [m for m in mounted if root.is_relative_to(m.mount_point)]
    return max(enumerate(above), key=lambda pair: (len(pair[1].mount_point.parts), pair[0]))[1].kind if above else ""


def check_locks_hold(root: Path, mounted: Iterable[Mount]) -> None:
    """Raise Unsupported if a store's locks would not hold at this path."""
    kind = file_system_of(root, mounted)
    if kind in NETWORK_FILE_SYSTEMS:
        raise Unsupported(
            f"the store at {root} is on {kind}, where locks do not hold between machines and two nodes could write "
            "one store: set storage.path in node.toml to a disk of this machine"
        )
