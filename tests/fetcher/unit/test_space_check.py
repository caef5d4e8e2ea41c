"""What keeps a full disk full, by what storage reports and by what can be written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from shoal_common.messages.storage import SpaceCheck
from shoal_common.names import model_id
from shoal_common.store.store_paths import StorePaths
from shoal_fetcher.downloads.space_check import find_shortage
from shoal_fetcher.partials.disk_writes import probe_disk
from shoal_fetcher.storage_client import StorageClient

MODEL = model_id("org/name", "c" * 40)
BLOB = "a" * 64


class ReportingStorage(StorageClient):
    """A storage that reports this space."""

    def __init__(self, space: SpaceCheck) -> None:
        self._space = space

    async def check_space(self, model: str) -> SpaceCheck:
        """Return the space."""
        assert model == MODEL
        return self._space


async def test_a_shortage_names_the_bytes_that_lack(tmp_path: Path) -> None:
    space = SpaceCheck(enough=False, lacking_bytes=7, free_bytes=3, headroom_bytes=2)
    shortage = await find_shortage(ReportingStorage(space), StorePaths(tmp_path), MODEL, BLOB)
    assert shortage is not None and shortage.code == "disk_full"
    assert shortage.message == (
        "disk full: 7 B more needed, 3 B free (2 B of it stay free); free some space and the download resumes"
    )
    assert shortage.details == {"lacking_bytes": 7, "free_bytes": 3, "headroom_bytes": 2}


async def test_free_space_that_cannot_be_written_is_a_shortage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, layout = ReportingStorage(SpaceCheck(enough=True)), StorePaths(tmp_path)
    layout.partial(BLOB).mkdir(parents=True)
    real, refused = os.pwrite, list[int]()

    def quota(fd: int, data: bytes, offset: int) -> int:
        if not refused:
            refused.append(fd)
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", quota)
    shortage = await find_shortage(storage, layout, MODEL, BLOB)
    assert shortage is not None and shortage.message.startswith("disk full: Disk quota exceeded")
    assert await find_shortage(storage, layout, MODEL, BLOB) is None
    assert list(layout.partial(BLOB).iterdir()) == []


async def test_space_without_the_partial_blob_is_no_shortage(tmp_path: Path) -> None:
    assert await find_shortage(ReportingStorage(SpaceCheck(enough=True)), StorePaths(tmp_path), MODEL, BLOB) is None


def test_a_write_probe_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, real = list[int](), os.pwrite

    def counted(fd: int, data: bytes, offset: int) -> int:
        written.append(len(data))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", counted)
    probe_disk(tmp_path)
    assert written == [4096] and list(tmp_path.iterdir()) == []
