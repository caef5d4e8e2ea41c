"""kill -9 at every system call of making and removing a lease (I6), and what the next start makes of it."""

from __future__ import annotations

import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shoal_common.store.store_paths import StorePaths
from shoal_storage.leases import lease_files
from shoal_storage.ledger.lease import LOCK_DEADLINE_S
from tests.harness.straced import Ended, straced
from tests.storage import crash_child_lease
from tests.storage.crash_child_model import STAYS
from tests.storage.service.test_store_kills import CHANGES
from tests.storage.store_fixtures import StoreFixture, check_invariants, files_below, files_of

CALLS = [*CHANGES, "openat", "ioctl", "flock", "fchmod", "utimensat", "symlink"]
_CALL = re.compile(r"^(?:\d+ +)?(\w+)\(")


def test_the_next_start_has_complete_leases_and_cleans_dead_ones(tmp_path: Path) -> None:
    store = StoreFixture(tmp_path / "store")
    store.bring_in(STAYS)
    kept, dead = store.lease(STAYS, "kept"), store.lease(STAYS, "dead")
    paths = store.layout
    (paths.lease(dead.id) / "lease.json").write_bytes(b"")
    shutil.copytree(paths.lease(kept.id), paths.leases / ".half.new")
    (paths.leases / "not a lease").mkdir()
    del store
    again = StoreFixture(tmp_path / "store")
    assert set(again.ledger.uses.leases) == {"kept"} and again.leased_view_is_complete(kept, STAYS)
    assert {p.name for p in paths.leases.iterdir()} == {"kept", "not a lease"}


def check_after(root: Path, acknowledged: list[str]) -> None:
    """What the next start must find."""
    check_invariants(root)
    store = StoreFixture(root)
    leases, paths = store.ledger.uses.leases, store.layout
    assert {p.name for p in paths.leases.iterdir()} == set(leases), "an unfinished lease is left"
    assert not any(paths.tombstones.iterdir())
    for lease in leases.values():
        assert store.leased_view_is_complete(lease, STAYS)
    made = {line.split()[1] for line in acknowledged if line.startswith("made")}
    assert "second" in leases or "second" not in made, "a lease that was given has gone within its grace"
    assert not ("first" in leases and "ended first" in acknowledged), "a lease that ended is back"
    # Nobody has taken them up: after their grace they are removed without a trace.
    now_s, clock_s = time.monotonic(), time.time()
    assert lease_files.read_leases(store.disk, now_s, clock_s + LOCK_DEADLINE_S) == {}
    assert store.holds(STAYS)
    assert files_below(root) == files_of(STAYS)


NO_STRACE = pytest.mark.skipif(
    shutil.which("strace") is None, reason="no strace: kills and refusals at every call are NOT tested here"
)


class Points:
    """The calls that a life of leases makes below a store, with a store for each of them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        StoreFixture(directory / "whole").bring_in(STAYS)
        root, trace, calls = self._fresh("traced"), directory / "trace", ",".join(f"?{c}" for c in CALLS)
        ended = self._live(root, "-o", str(trace), "-e", f"trace={calls}")
        assert ended.returncode == 0, ended.stderr
        paths, counts = StorePaths(root), Counter[str]()
        self.all: list[tuple[str, int]] = []
        for line in trace.read_text().splitlines():
            if match := _CALL.match(line):
                counts[match.group(1)] += 1
                if str(paths.leases) in line or str(paths.tombstones) in line:
                    self.all.append((match.group(1), counts[match.group(1)]))

    def _live(self, root: Path, *strace: str) -> Ended:
        directory = self._directory / f"output-{root.name}"
        directory.mkdir()
        return straced(strace, directory, crash_child_lease.main, root)

    def _fresh(self, name: str) -> Path:
        shutil.copytree(self._directory / "whole", self._directory / name)
        return self._directory / name

    def hit(self, points: list[tuple[str, int]], how: str) -> Iterator[Ended]:
        """Run a life for each point, in which that call fails, and check what the next start finds."""

        def one(point: tuple[str, int]) -> tuple[Path, Ended]:
            call, n = point
            at = self._fresh(f"{call}-{n}")
            return at, self._live(at, "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:{how}:when={n}")

        with ThreadPoolExecutor(2) as two:
            for point, (at, ended) in zip(points, two.map(one, points), strict=True):
                try:
                    check_after(at, ended.stdout.splitlines())
                except AssertionError as e:
                    raise AssertionError(f"{how} at {point} after {ended.stdout.splitlines()[-1:]}: {e}") from e
                yield ended


@NO_STRACE
def test_I6_a_kill_at_any_call_of_a_lease_leaves_nothing(in_memory: Path) -> None:
    points = Points(in_memory)
    assert len(points.all) > 40, points.all
    for ended in points.hit(points.all, "signal=SIGKILL"):
        assert ended.returncode != 0, "it was never reached"


@NO_STRACE
def test_I6_a_full_disk_refuses_a_lease_and_nothing_stays_behind(in_memory: Path) -> None:
    points = Points(in_memory)
    refused = [point for point in points.all if point[0] in ("write", "ioctl")]
    assert {call for call, _ in refused} == {"write", "ioctl"}
    reported = ["No space left" in ended.stderr for ended in points.hit(refused, "error=ENOSPC")]
    # Python calls ioctl on each file it opens to see whether it is a terminal, and ignores a refusal.
    assert reported.count(True) >= 4
