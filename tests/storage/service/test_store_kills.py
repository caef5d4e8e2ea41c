"""kill -9 at every change that a model's life makes to the disk (I6), and the order of those changes.

strace kills the process as it enters its n-th call of a kind, for every n that a life has.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from shoal_common.names import model_id
from shoal_common.store.store_paths import StorePaths
from tests.harness.memory_directory import directory_in_memory
from tests.harness.straced import Ended, straced
from tests.storage import crash_child_model
from tests.storage.crash_child_model import COMES, LEAVES, STAYS
from tests.storage.store_fixtures import StoreFixture, check_invariants, files_below, files_of

CHANGES = [
    "mkdir",
    "rename",
    "link",
    "unlink",
    "unlinkat",
    "rmdir",
    "chmod",
    "fsync",
    "ftruncate",
    "write",
    "pwrite64",
]
_CALL = re.compile(r"^(?:\d+ +)?(\w+)\(")
_NO_STRACE = "no strace on this machine: kills at every change are NOT tested here"
pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason=_NO_STRACE)


class Life(msgspec.Struct, frozen=True):
    """A life in a directory, with its blobs in the store or on a volume."""

    directory: Path
    has_volume: bool

    @property
    def store_path(self) -> Path:
        """The path of the store."""
        return self.directory / "store"

    @property
    def volume_path(self) -> Path | None:
        """The path of the volume, if it has one."""
        return self.directory / "volume" if self.has_volume else None

    @property
    def blobs(self) -> StorePaths:
        """The paths of the volume or store that the blobs go to."""
        return StorePaths(self.volume_path or self.store_path)


def live(life: Life, *strace: str) -> Ended:
    """Run a model's life under strace."""
    return straced(strace, life.directory, crash_child_model.main, life.store_path, life.volume_path)


@pytest.fixture(scope="module", params=[False, True], ids=["store", "volume"])
def uninterrupted_life(request: pytest.FixtureRequest) -> Iterator[tuple[Life, list[str]]]:
    """Every change of an uninterrupted life, in order, with the paths."""
    with directory_in_memory() as directory:
        yield _uninterrupted_life(Life(directory, request.param))


def _uninterrupted_life(life: Life) -> tuple[Life, list[str]]:
    calls, trace = ",".join(f"?{c}" for c in CHANGES), life.directory / "trace"
    ended = live(life, "-o", str(trace), "-e", f"trace={calls}")
    assert ended.returncode == 0, ended.stderr
    return life, trace.read_text().splitlines()


def start_after(life: Life, acknowledged: list[str]) -> None:
    """What the next start must find, given what the killed process had acknowledged."""
    root, volume = life.store_path, life.volume_path
    check_invariants(root, volume=volume)
    acknowledged_calls = {(what, which) for what, _, which in (line.partition(" ") for line in acknowledged)}
    store = StoreFixture(root, volume)
    check_invariants(root, volume=volume)
    assert volume is None or not any((volume / "tombs").iterdir())
    ledger, stays = store.ledger, {f.sha256 for f in STAYS.sealed.files}
    leaves = {*LEAVES.blobs, *(f.sha256 for f in LEAVES.sealed.files)} - stays
    assert not ledger.incomplete
    if ("sealed", STAYS.name) in acknowledged_calls:
        assert store.holds(STAYS)
    if ("deleted", LEAVES.name) in acknowledged_calls:
        assert LEAVES.name not in ledger.manifests and not leaves & set(ledger.blobs)
    elif ("sealed", LEAVES.name) in acknowledged_calls and LEAVES.name not in ledger.manifests:
        assert set(ledger.blobs) == stays, "a deletion that had begun was not finished"
    for what, which in acknowledged_calls:
        if what == "committed" and which not in leaves:
            assert which in ledger.blobs, "an acknowledged blob is lost"
        if what == "reserved" and which not in leaves:
            assert which in {*ledger.arrivals.partials, *ledger.blobs}, "an acknowledged reservation is lost"
    assert not any(store.layout.tombstones.iterdir())
    assert not [p for p in files_below(root) if p.endswith(".json.new")]
    # Everything goes on from here, to the same end.
    for model in (STAYS, LEAVES, COMES):
        store.bring_in(model)
    store.delete(LEAVES)
    assert store.holds(STAYS) and store.holds(COMES)
    here = files_below(root) | (files_below(volume) if volume else set())
    assert here - {f"volumes/{identity}" for identity in store.disk.volumes} == files_of(STAYS, COMES)


def test_I6_I1_I2_a_kill_at_any_change_loses_nothing_acked(
    in_memory: Path, uninterrupted_life: tuple[Life, list[str]]
) -> None:
    full_life, calls = uninterrupted_life
    counts = Counter(match.group(1) for line in calls if (match := _CALL.match(line)))
    assert counts.total() > 100, counts
    points = [(call, n) for call, count in counts.items() for n in range(1, count + 1)]

    def kill_at(point: tuple[str, int]) -> tuple[Life, list[str]]:
        call, n = point
        life = Life(in_memory / f"{call}-{n}", full_life.has_volume)
        life.directory.mkdir()
        inject = f"inject={call}:signal=SIGKILL:when={n}"
        ended = live(life, "-o", "/dev/null", "-e", f"trace={call}", "-e", inject)
        assert ended.returncode != 0, f"{call} number {n} was never reached"
        return life, ended.stdout.splitlines()

    with ThreadPoolExecutor(2) as two:
        for point, (life, acknowledged) in zip(points, two.map(kill_at, points), strict=True):
            try:
                start_after(life, acknowledged)
            except AssertionError as e:
                raise AssertionError(f"killed at {point} after {acknowledged[-1:]}: {e}") from e


def final_name(what: str, which: str, life: Life) -> str:
    """The rename that makes an acknowledgement true, by its target."""
    if what == "reserved":
        return str(life.blobs.partial(which) / "meta.json")
    if what == "committed":
        return str(life.blobs.blob(which))
    layout = StorePaths(life.store_path)
    repo, _, commit = which.partition("@")
    return str(layout.manifest(model_id(repo, commit)) if what == "sealed" else layout.tombstones)


def test_I6_nothing_is_acknowledged_before_it_is_durable(uninterrupted_life: tuple[Life, list[str]]) -> None:
    """A kill cannot show a missing fsync; the order of the calls can."""
    life, calls = uninterrupted_life
    tombstones = tuple(str(StorePaths(root).tombstones) for root in (life.store_path, life.volume_path) if root)
    synced: dict[str, int] = {}
    renamed: dict[str, tuple[int, str]] = {}
    acknowledged = 0
    for at, line in enumerate(calls):
        if match := re.search(r"fsync\(\d+<([^>]+)>", line):
            synced[match.group(1)] = at
        elif match := re.search(r'rename\("([^"]+)", "([^"]+)"', line):
            source, target = match.groups()
            if not target.startswith(tombstones):
                assert source in synced, f"{target} got its name before its bytes were durable"
            renamed[target] = at, source
        elif match := re.search(r'write\(1<[^>]*>, "(\w+) ([^ \\]+)', line):
            what, which = match.groups()
            wanted = final_name(what, which, life)
            # The tombstone of a manifest has a name of its own in tombs/; everything else keeps its expected name.
            target = next(t for t in reversed(renamed) if t == wanted or t.startswith(f"{wanted}/org--"))
            named_at, source = renamed[target]
            must = {Path(target).parent, Path(source).parent}
            if what == "reserved":
                must.add(life.blobs.partials)
            for directory in must:
                assert synced.get(str(directory), 0) > named_at, f"{what} {which}: {directory} is not durable"
            acknowledged += 1
    assert acknowledged == 12


def test_bytes_whose_fsync_failed_are_corrupt_despite_another(in_memory: Path) -> None:
    life = Life(in_memory, has_volume=False)
    blob = STAYS.manifest.files[0].blob
    data = life.blobs.partial(blob) / "data"
    ended = live(life, "-o", "/dev/null", "-P", str(data), "-e", "trace=fsync", "-e", "inject=fsync:error=EIO:when=1")
    assert ended.returncode != 0
    assert "Corrupt: the disk could not store the bytes of" in ended.stderr
    assert ended.stdout == f"reserved {blob}\n"
