"""Every change of the disk fails once, in every way a disk fails; and a disk full to the last byte (I6).

Nothing false is acknowledged, and the store goes on from there.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shoal_common.errors import ShoalError
from tests.harness.fresh import Fresh
from tests.harness.nats import NatsServer
from tests.harness.tiny_filesystem import fill, small_disk
from tests.storage.crash_child_store import live
from tests.storage.durability_checks import Acknowledged
from tests.storage.running_storage import on_node
from tests.storage.service.test_store_kills import Life, start_after
from tests.storage.service.test_store_kills import live as live_under_strace
from tests.storage.store_fixtures import Model, StoreFixture, check_invariants, files_below, files_of
from tests.storage.syscall_tracer import Call, seen

ANY_CALL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
TWO_PLACES = (*ANY_CALL, errno.EMLINK, errno.EXDEV)
FULL_BYTES = 8 << 20


def faults_of(call: Call) -> tuple[int, ...]:
    """The errors with which a call fails."""
    if call.name in ("replace", "rename", "link"):
        return TWO_PLACES
    return (*ANY_CALL, errno.EMLINK) if call.name == "mkdir" else ANY_CALL


def live_with_fault(directory: Path, site: tuple[str, str], number: int) -> tuple[Acknowledged, bool]:
    """A life in which the first call at a site fails. Returns what it acknowledged, and whether it failed."""
    acknowledged, refused = Acknowledged(), False

    def before(call: Call) -> bool:
        nonlocal refused
        if not refused and (call.name, call.site) == site:
            refused = True
            raise OSError(number, os.strerror(number), call.paths[-1])
        return True

    directory.mkdir()
    try:
        with seen(directory, before):
            live(directory / "store", acknowledged.hear)
    except (OSError, ShoalError):
        return acknowledged, True
    finally:
        assert refused, f"{site} was never reached"
    return acknowledged, False


def test_I6_no_refused_call_is_a_success_and_the_store_goes_on(in_memory: Path) -> None:
    (in_memory / "whole").mkdir()
    with seen(in_memory / "whole") as whole:
        live(in_memory / "whole" / "store", lambda *_: None)
    calls = {(c.name, c.site): c for c in whole.calls}
    points = [(site, number) for site, call in calls.items() for number in faults_of(call)]
    assert len(points) > 200, len(points)
    wrong = []
    for at, (site, number) in enumerate(points):
        directory = in_memory / str(at)
        try:
            acknowledged, failed = live_with_fault(directory, site, number)
            assert failed or site[0] != "fsync", "a failed fsync went unnoticed"
            acknowledged.hold(directory / "store")
        except Exception as e:  # noqa: BLE001  # all of them are told together
            wrong.append(f"{errno.errorcode[number]} at {site}: {type(e).__name__}: {e}")
        shutil.rmtree(directory)
    assert not wrong, "\n".join(wrong)


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace: refused writes are NOT tested here")
def test_I6_a_refused_write_is_not_taken_for_success(in_memory: Path) -> None:
    ended = live_under_strace(Life(in_memory, has_volume=False), "-o", str(in_memory / "trace"), "-e", "trace=write")
    assert ended.returncode == 0, ended.stderr
    count = Counter(line.partition("(")[0].split()[-1] for line in (in_memory / "trace").read_text().splitlines())
    assert count["write"] > 15, count
    points = [(error, n) for error in ("ENOSPC", "EIO") for n in range(1, count["write"] + 1)]

    def refuse(point: tuple[str, int]) -> tuple[Life, int, list[str]]:
        error, n = point
        life = Life(in_memory / f"{error}-{n}", has_volume=False)
        life.directory.mkdir()
        inject = f"inject=write:error={error}:when={n}"
        ended = live_under_strace(life, "-o", "/dev/null", "-e", "trace=write", "-e", inject)
        return life, ended.returncode, ended.stdout.splitlines()

    with ThreadPoolExecutor(2) as two:
        for point, (life, _, acknowledged) in zip(points, two.map(refuse, points), strict=True):
            try:
                start_after(life, acknowledged)
            except AssertionError as e:
                raise AssertionError(f"refused at {point} after {acknowledged[-1:]}: {e}") from e


LARGE = Model("org/large", {"weights.bin": b"w" * (2 << 20), "config.json": b"{}"})
OTHER = Model("org/other", {"weights.bin": b"o" * (1 << 20), "config.json": b"{}"})


async def test_I6_at_0_bytes_free_the_service_starts_and_deletes(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.fetcher():
        with small_disk(node.layout.root, FULL_BYTES) as disk:
            async with node.storage() as process:
                await node.bring_in(LARGE)
                await process.kill()
            fill(disk)
            async with node.storage() as process:
                assert await node.model_state(LARGE) is not None
                with pytest.raises(ShoalError):
                    await node.reserve(OTHER.manifest)
                outcome = await node.delete("org/large")
                assert outcome.ok and outcome.result["freed_bytes"] == LARGE.manifest.size_bytes
                assert os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize >= LARGE.manifest.size_bytes
                await node.bring_in(OTHER)
                (disk / "filler").unlink()
                assert files_below(disk) == files_of(OTHER)
                check_invariants(disk)
                await process.kill()


def test_I6_a_disk_that_fills_up_at_commit_or_seal_does_no_harm(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", FULL_BYTES) as disk:
        store = StoreFixture(disk / "store")
        store.bring_in(LARGE)
        store.reserve(OTHER)
        fill(disk)
        with pytest.raises(OSError, match="No space left"):
            store.bring_in(OTHER)
        (disk / "filler").unlink()
        check_invariants(disk / "store")
        store.bring_in(OTHER)
        fill(disk)
        store.delete(LARGE)
        assert store.holds(OTHER)
        (disk / "filler").unlink()
        assert files_below(disk / "store") == files_of(OTHER)
