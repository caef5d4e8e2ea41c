"""When another source serves a file. Pure."""

from __future__ import annotations

from itertools import pairwise

from shoal_fetcher.sources.source_changes import MIN_INTERVAL_S, STALE_S, SourceChange, SourceChanges

PATH = "model.safetensors"


def test_several_sources_at_a_time_are_no_change() -> None:
    sources = SourceChanges()
    for at in range(20):
        assert sources.received(PATH, "b", float(at)) is None
        assert sources.received(PATH, "c", at + 0.5) is None


def test_a_failed_source_is_replaced_by_the_next_one_that_sends() -> None:
    sources = SourceChanges()
    assert sources.received(PATH, "b", 0.0) is None
    sources.failed(PATH, "c")
    assert sources.received(PATH, "c", 0.1) is None, "another one failed"
    sources.failed(PATH, "b")
    assert sources.received("config.json", "hub", 0.2) is None, "another file"
    assert sources.received(PATH, "hub", 0.2) == SourceChange(PATH, "b", "hub")
    assert sources.received(PATH, "hub", 0.3) is None


def test_a_source_that_sends_again_after_a_failure_is_no_change() -> None:
    sources = SourceChanges()
    sources.received(PATH, "b", 0.0)
    sources.failed(PATH)
    assert sources.received(PATH, "b", 0.1) is None
    assert sources.received(PATH, "hub", 0.2) is None


def test_a_source_that_stops_sending_is_replaced_after_a_while() -> None:
    sources = SourceChanges()
    sources.received(PATH, "b", 0.0)
    assert sources.received(PATH, "hub", STALE_S - 0.1) is None
    assert sources.received(PATH, "hub", STALE_S) == SourceChange(PATH, "b", "hub")


def test_changes_of_one_file_are_reported_seldom() -> None:
    sources, reported = SourceChanges(), []
    for at in range(100):
        change = sources.received(PATH, f"node-{at}", float(at))
        reported += [float(at)] if change else []
        sources.failed(PATH)
    assert reported[0] == 1.0 and len(reported) == 4
    assert all(later - earlier >= MIN_INTERVAL_S for earlier, later in pairwise(reported))
