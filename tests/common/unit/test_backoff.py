"""Waits after failures in a row."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal_common.concurrency.backoff import Backoff


@given(st.floats(1e-3, 10), st.floats(1, 1e3), st.integers(1, 10**9))
def test_waits_grow_from_the_first_to_the_longest(first_s: float, factor: float, failures: int) -> None:
    backoff = Backoff(first_s, first_s * factor)
    assert first_s <= backoff.delay_s(failures) <= backoff.delay_s(failures + 1) <= backoff.max_s
    assert backoff.delay_s(10**9) == backoff.max_s


def test_each_wait_is_twice_the_one_before() -> None:
    assert [Backoff(0.25, 8.0).delay_s(n) for n in range(8)] == [0, 0.25, 0.5, 1, 2, 4, 8, 8]
