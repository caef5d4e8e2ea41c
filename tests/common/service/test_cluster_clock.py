"""The cluster's clock is NATS's, whatever the local clock says."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from shoal_common.bus import cluster_clock
from tests.harness.nats import NatsServer, joined

OFF_S = 5 * 3600.0


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reset the clock before and after the test."""
    monkeypatch.setattr(cluster_clock, "_offset_s", None)
    yield


@pytest.mark.parametrize("off_s", [-OFF_S, OFF_S])
async def test_a_machine_with_a_wrong_clock_uses_the_time_of_nats(
    nats: NatsServer, monkeypatch: pytest.MonkeyPatch, off_s: float
) -> None:
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + off_s)
    assert abs(cluster_clock.now_s() - right()) > OFF_S / 2, "its own, until NATS was heard"
    async with joined(nats) as here:
        await cluster_clock.sync_from_nats(here.client)
    assert abs(cluster_clock.now_s() - right()) < OFF_S / 2
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert abs(cluster_clock.now_s() - right()) < OFF_S / 2, "set while it runs, it makes no difference"


async def test_without_an_answer_the_clock_goes_on_as_it_was(own_nats: NatsServer) -> None:
    async with joined(own_nats) as here:
        await cluster_clock.sync_from_nats(here.client)
        before_s = cluster_clock.now_s()
        await here.js.delete_stream("CMD")
        await cluster_clock.sync_from_nats(here.client)
    assert cluster_clock.now_s() >= before_s


@pytest.mark.parametrize(
    ("stamp", "seconds"),
    [
        ("1970-01-01T00:00:01Z", 1.0),
        ("1970-01-01T00:00:01.5Z", 1.5),
        ("1970-01-01T00:00:01.123456789Z", 1.123456),
        ("1970-01-01T02:00:01.25+02:00", 1.25),
    ],
)
def test_times_of_nats_are_read(stamp: str, seconds: float) -> None:
    assert cluster_clock.parse_nats_time(stamp) == seconds
