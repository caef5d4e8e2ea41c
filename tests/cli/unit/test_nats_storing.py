"""When a NATS that refuses to store is restarted: with room on its disk, and ever more seldom."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from shoal_cli.node.children.nats_storing import MIN_FREE_BYTES, RESTART_BACKOFF, NatsStoring

REFUSAL = b"[7] 2026/12/01 01:08:12.9 [ERR] JetStream stream '$G > KV_live' critical write error: write /n: no space"
OTHER = b"[7] 2026/12/01 01:08:12.971601 [ERR] 10.0.0.1:5 - cid:4 - authentication error"


def refusing() -> NatsStoring:
    """A server that has just refused."""
    storing = NatsStoring()
    storing.read_line(REFUSAL)
    return storing


def test_a_server_that_stores_is_left_alone() -> None:
    storing = NatsStoring()
    storing.read_line(OTHER)
    assert storing.decide(MIN_FREE_BYTES, 100.0) == "nothing" and storing.problem("/n", MIN_FREE_BYTES) == ""


def test_it_is_restarted_only_when_there_is_room() -> None:
    assert refusing().decide(MIN_FREE_BYTES - 1, 100.0) == "wait"
    assert refusing().decide(MIN_FREE_BYTES, 100.0) == "restart"


def test_a_full_disk_and_a_refusal_are_named() -> None:
    assert "the disk of /n is full (0 B free)" in NatsStoring().problem("/n", 0)
    assert "NATS refuses to store in /n" in refusing().problem("/n", MIN_FREE_BYTES)


@given(st.lists(st.floats(0.0, 100.0), min_size=60, max_size=200))
def test_restarts_of_one_that_goes_on_refusing_are_bounded(steps_s: list[float]) -> None:
    storing, now_s, restarts_s = NatsStoring(), 0.0, list[float]()
    for step_s in steps_s:
        now_s += step_s
        storing.read_line(REFUSAL)
        if storing.decide(MIN_FREE_BYTES, now_s) == "restart":
            storing.restarting(now_s)
            restarts_s.append(now_s)
    waits_s = [after - before for before, after in pairwise(restarts_s)]
    for count, wait_s in enumerate(waits_s, start=1):
        assert wait_s >= RESTART_BACKOFF.delay_s(count)


def test_a_long_time_of_storing_starts_the_waits_anew() -> None:
    storing = refusing()
    for now_s in (1000.0, 1010.0, 5000.0):
        storing.restarting(now_s)
    storing.read_line(REFUSAL)
    assert storing.decide(MIN_FREE_BYTES, 5000.0 + RESTART_BACKOFF.first_s) == "restart"
