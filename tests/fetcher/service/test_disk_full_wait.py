"""Waiting for free space on a full disk: until there is some, with limits, and across restarts. Time is simulated."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from shoal_common.bus.keys import download_key
from shoal_common.concurrency.backoff import Backoff
from shoal_common.errors import DiskFull, NodeDown, ShoalError
from shoal_common.messages.downloads import DownloadState
from shoal_common.messages.storage import SpaceCheck
from shoal_common.store.store_paths import StorePaths
from shoal_fetcher.cluster_view import ClusterView
from shoal_fetcher.downloads import disk_full_wait as blocked_module
from shoal_fetcher.downloads.disk_full_wait import DiskFullWait
from shoal_fetcher.partials.disk_writes import probe_disk
from shoal_fetcher.progress import Progress
from shoal_fetcher.sources.failure_policy import FUTILE_ATTEMPT_BACKOFF, MAX_BLOCKED_S, SPACE_CHECK_BACKOFF
from shoal_fetcher.storage_client import StorageClient
from tests.harness.fresh import Fresh
from tests.harness.nats import Joined, NatsServer, joined

MODEL = f"org/name@{'c' * 40}"
BLOB = "a" * 64
FULL = SpaceCheck(enough=False, lacking_bytes=7, free_bytes=3, headroom_bytes=2)
MET = DiskFull("disk full: No space left on device", blob=BLOB)
BEGUN_S = 1_800_000_000.0


class ScriptedStorage(StorageClient):
    """A storage with these answers; the last one is repeated."""

    def __init__(self, *answers: SpaceCheck | ShoalError) -> None:
        self._answers = list(answers)
        self.asked_count = 0

    async def check_space(self, model: str) -> SpaceCheck:
        """Return the next answer."""
        assert model == MODEL
        self.asked_count += 1
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, ShoalError):
            raise answer
        return answer


class Passing(ClusterView):
    """A cluster in which waiting advances the time."""

    def __init__(self) -> None:
        self.now_s = BEGUN_S
        self.waited_s: list[float] = []

    def disk_status(self) -> tuple[object, ...]:
        """The disk never changes."""
        return ()

    async def wait_disk_changed(self, before: tuple[object, ...], deadline_s: float) -> None:
        """Advance the time to the deadline."""
        self.now_s += deadline_s
        self.waited_s.append(deadline_s)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits that nothing ends early take no time."""
    monkeypatch.setattr(blocked_module, "_MIN_INTERVAL_S", 0.0)
    monkeypatch.setattr(blocked_module, "FUTILE_ATTEMPT_BACKOFF", Backoff(0.0, 0.0))


def progress_of(here: Joined, node: str, **fields: float) -> Progress:
    state = DownloadState(node=node, model="org/name", phase="fetching", **fields)  # type: ignore[arg-type]  # times and bytes
    return Progress(here.buckets.state, state)


async def test_a_wait_publishes_lacking_bytes_and_ends_when_they_fit(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with joined(nats) as here:
        progress, around = progress_of(here, node := fresh("node")), Passing()
        storage = ScriptedStorage(FULL, NodeDown("it restarts"), FULL, SpaceCheck(enough=True))
        blockage = DiskFullWait(progress, storage, around, StorePaths(tmp_path), lambda: around.now_s)
        await blockage.wait_for_space(MODEL, MET)
        await progress.publish()  # as every second
        published = await here.buckets.state.get_as(download_key(node, "org/name"), DownloadState)
        assert published is not None and published.phase == "blocked" and published.blocked_since_s == BEGUN_S
        assert published.waiting_for == (
            "disk full: 7 B more needed, 3 B free (2 B of it stay free); free some space and the download resumes"
        )
        assert published.error is not None and published.error.code == "disk_full"
        assert published.error.details == {"lacking_bytes": 7, "free_bytes": 3, "headroom_bytes": 2}
        assert storage.asked_count == 4 and around.waited_s == [SPACE_CHECK_BACKOFF.delay_s(n) for n in (1, 2, 3)]


async def test_I7_a_day_without_space_ends_in_an_error_that_names_it(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with joined(nats) as here:
        around = Passing()
        blockage = DiskFullWait(
            progress_of(here, fresh("node")),
            ScriptedStorage(FULL),
            around,
            StorePaths(tmp_path),
            lambda: around.now_s,
        )
        with pytest.raises(DiskFull, match=r"was full for 24 h while org/name arrived \(disk full: 7 B more needed"):
            await blockage.wait_for_space(MODEL, MET)
        assert MAX_BLOCKED_S < around.now_s - BEGUN_S < MAX_BLOCKED_S + 120


@pytest.mark.parametrize("moved", [False, True])
async def test_I7_the_deadline_moves_only_with_durable_bytes(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, moved: bool
) -> None:
    async with joined(nats) as here:
        around = Passing()
        progress = progress_of(here, fresh("node"), done_bytes=10, blocked_since_s=BEGUN_S - MAX_BLOCKED_S - 1)
        progress.reset_counts()
        progress.set_durable_bytes(BLOB, 11 if moved else 10)
        blockage = DiskFullWait(
            progress, ScriptedStorage(SpaceCheck(enough=True)), around, StorePaths(tmp_path), lambda: around.now_s
        )
        if moved:
            await blockage.wait_for_space(MODEL, MET)
            assert progress.state.blocked_since_s == BEGUN_S
            around.now_s += MAX_BLOCKED_S + 1
        with pytest.raises(DiskFull, match="was full for 24 h"):
            await blockage.wait_for_space(MODEL, MET)


async def test_free_space_that_cannot_be_written_does_not_end_the_wait(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with joined(nats) as here:
        progress, around, layout = progress_of(here, fresh("node")), Passing(), StorePaths(tmp_path)
        layout.partial(BLOB).mkdir(parents=True)
        real, refused = os.pwrite, list[int]()

        def quota(fd: int, data: bytes, offset: int) -> int:
            if len(refused) < 3:
                refused.append(fd)
                raise OSError(errno.EDQUOT, "Disk quota exceeded")
            return real(fd, data, offset)

        monkeypatch.setattr(os, "pwrite", quota)
        storage = ScriptedStorage(SpaceCheck(enough=True))
        await DiskFullWait(progress, storage, around, layout, lambda: around.now_s).wait_for_space(MODEL, MET)
        assert storage.asked_count == 4 and len(refused) == 3
        assert progress.state.waiting_for.startswith("disk full: Disk quota exceeded")
        assert list(layout.partial(BLOB).iterdir()) == []


def test_a_write_probe_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, real = list[int](), os.pwrite

    def counted(fd: int, data: bytes, offset: int) -> int:
        written.append(len(data))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", counted)
    probe_disk(tmp_path)
    assert written == [4096] and list(tmp_path.iterdir()) == []


def test_I7_waits_grow_and_have_a_bound() -> None:
    assert [FUTILE_ATTEMPT_BACKOFF.delay_s(n) for n in (0, 1, 2, 3, 7, 8, 10**6)] == [0, 1, 2, 4, 60, 60, 60]
    assert [SPACE_CHECK_BACKOFF.delay_s(n) for n in (1, 2, 3, 4, 5, 10**6)] == [5, 10, 20, 40, 60, 60]
