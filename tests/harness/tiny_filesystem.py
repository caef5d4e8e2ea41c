"""A small file system for a test, and a way to fill it to the last byte."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness.process import checked_run

FILLER = "filler"
_DEADLINE_S = 60


def no_small_disks() -> str:
    """Return why no small disk can be mounted on this machine; "" if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "only root on Linux can mount a small disk"
    with tempfile.TemporaryDirectory() as at:
        made = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", at], capture_output=True, check=False)
        if made.returncode == 0:
            subprocess.run(["umount", "-l", at], check=True)
            return ""
    return f"a small disk cannot be mounted: {made.stderr.decode()}"


@contextmanager
def small_disk(at: Path, size_bytes: int, files: int = 4096) -> Iterator[Path]:
    """Mount a file system of this many bytes and files while the body runs. Skips where that is not possible."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root on Linux can mount a small disk: a full disk is NOT tested here")
    at.mkdir(parents=True, exist_ok=True)
    options = f"size={size_bytes},nr_inodes={files}"
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(at)], capture_output=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted, a full disk is NOT tested here: {made.stderr.decode()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


class LoopDisk:
    """A disk, an ext4 in a file, that can be unmounted and mounted again."""

    def __init__(self, image: Path, at: Path, size_bytes: int) -> None:
        self.at = at
        at.mkdir(parents=True, exist_ok=True)
        with image.open("wb") as f:
            f.truncate(size_bytes)
        _run("mkfs.ext4", "-q", "-F", "-m", "0", str(image))
        # One device for its whole life: two over one file would not see each other's writes.
        self._device = _run("losetup", "--find", "--show", str(image)).strip()

    def mount(self) -> None:
        """Mount the disk."""
        _run("mount", "-t", "ext4", self._device, str(self.at))

    def unmount(self) -> None:
        """Unmount it, even if files on it are open."""
        _run("umount", "-l", str(self.at))

    def close(self) -> None:
        """Delete it."""
        while os.path.ismount(self.at):
            self.unmount()
        _run("losetup", "--detach", self._device)


@contextmanager
def loop_disk(at: Path, size_bytes: int) -> Iterator[LoopDisk]:
    """Mount a disk with an empty ext4 while the body runs. Skips where that is not possible."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root on Linux can mount a disk: unmounting one is NOT tested here")
    try:
        disk = LoopDisk(at.with_name(f"{at.name}.image"), at, size_bytes)
    except (OSError, AssertionError) as e:
        pytest.skip(f"a disk cannot be made, unmounting one is NOT tested here: {e}")
    try:
        disk.mount()
        yield disk
    finally:
        disk.close()


def _run(*command: str) -> str:
    return checked_run(*command, timeout_s=_DEADLINE_S).stdout


def fill(directory: Path) -> Path:
    """Fill the free space. Returns the file that does."""
    return fill_more(directory / FILLER)


def fill_more(ballast: Path) -> Path:
    """Fill what was freed."""
    fill_up(ballast)
    assert free_bytes(ballast.parent) == 0
    return ballast


def fill_up(ballast: Path) -> None:
    """Fill what is free now. Other processes may free and take space meanwhile."""
    with ballast.open("ab", buffering=0) as f:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while f.write(b"x" * size):
                    pass
            except OSError as e:
                assert e.errno == errno.ENOSPC


def free_bytes(directory: Path) -> int:
    """Return the free bytes of the file system."""
    s = os.statvfs(directory)
    return s.f_bavail * s.f_frsize
