"""Proof that the tests detect a missing fsync: a store without the call fails, for every place that calls it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.storage.crash_child_store import live
from tests.storage.posix_disk_model import violations
from tests.storage.syscall_tracer import Call, seen

REDUNDANT = {"atomic_file.py:make_directory < atomic_file.py:make_directory < store.py:open"}
"""Places whose fsync could be left out: directories made beside `blobs` make their common parent durable again."""
REDUNDANT_ON_VOLUMES = {
    "atomic_file.py:make_directory < atomic_file.py:make_directory < volume.py:open_volume",
    "atomic_file.py:make_directory < store.py:open",
    "atomic_file.py:replace_file < store.py:open",
}
"""The same in a store with a volume: `volumes/`, made last, makes the store's top durable again."""


def without_lines(site: str) -> str:
    """A place by its functions."""
    return re.sub(r":\d+\b", "", site)


def lived(directory: Path, left_out: str = "", has_volume: bool = False) -> list[Call | tuple[str, str]]:
    """The calls and acknowledgements of a life without the fsyncs of one place."""
    directory.mkdir()
    with seen(directory, lambda call: call.name != "fsync" or call.site != left_out) as seam:
        live(directory / "store", seam.acknowledge, directory / "volume" if has_volume else None)
    return seam.events


def survivors(in_memory: Path, sites: list[str], has_volume: bool) -> set[str]:
    """The places whose missing fsync was not detected."""
    found = set()
    for number, site in enumerate(sites):
        root = in_memory / f"mutant-{number}"
        if not any(violations(str(root), lived(root, site, has_volume), has_volume)):
            found.add(without_lines(site))
    return found


def fsyncs(events: list[Call | tuple[str, str]]) -> set[str]:
    """The places where a life calls fsync."""
    return {e.site for e in events if isinstance(e, Call) and e.name == "fsync"}


@pytest.mark.parametrize("has_volume", [False, True])
def test_I6_I1_I2_the_store_is_durable_on_the_strictest_disk(in_memory: Path, has_volume: bool) -> None:
    events = lived(in_memory / "whole", has_volume=has_volume)
    assert len([e for e in events if isinstance(e, Call)]) > 200
    assert not list(violations(str(in_memory / "whole"), events, has_volume))


def test_every_omitted_fsync_is_detected(in_memory: Path) -> None:
    sites = fsyncs(lived(in_memory / "whole"))
    assert len(sites) >= 25, sites
    assert survivors(in_memory, sorted(sites), has_volume=False) == REDUNDANT


def test_every_omitted_fsync_of_a_volume_is_detected(in_memory: Path) -> None:
    alone = {without_lines(site) for site in fsyncs(lived(in_memory / "alone"))}
    sites = fsyncs(lived(in_memory / "whole", has_volume=True))
    assert len({without_lines(site) for site in sites} - alone) >= 5, sites
    assert survivors(in_memory, sorted(sites), has_volume=True) == REDUNDANT | REDUNDANT_ON_VOLUMES


def test_bytes_synced_only_after_their_rename_are_detected(in_memory: Path) -> None:
    events = lived(in_memory / "whole")
    durable = next(n for n, e in enumerate(events) if isinstance(e, Call) and "verify_partial" in e.site)
    named = next(
        n
        for n, e in enumerate(events)
        if isinstance(e, Call) and e.name == "replace" and e.site.startswith("commit.py:_name_blob:")
    )
    assert durable < named
    events.insert(named, events.pop(durable))
    assert any("I1" in reason for reason in violations(str(in_memory / "whole"), events))
