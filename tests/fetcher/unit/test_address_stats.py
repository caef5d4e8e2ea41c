"""Measured rates take precedence over the order of kinds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal_fetcher.swarm.address_stats import (
    FAILED_BACKOFF_S,
    MAX_ADDRESSES,
    MAX_TRIAL_BYTES,
    MEASUREMENT_TTL_S,
    MIN_BYTES,
    AddressStats,
)

TB, ETH, WIFI = ADDRESSES = ("10.9.0.5:1", "10.0.0.5:1", "192.168.2.5:1")
MIB = 1 << 20


def measured(rates: AddressStats, address: str, mib_per_s: float, now_s: float = 0.0) -> None:
    rates.record("b", address, 16 * MIB, 16 / mib_per_s, now_s)


def test_without_measurements_the_order_of_kinds_stays() -> None:
    assert AddressStats().sort_by_rate("b", ADDRESSES, 0.0) == list(ADDRESSES)
    assert AddressStats().sort_by_rate("b", ADDRESSES, 0.0, size_bytes=MIB) == list(ADDRESSES)
    assert AddressStats().sort_by_rate("b", (), 0.0) == []


def test_only_a_clearly_faster_address_goes_first() -> None:
    rates = AddressStats()
    measured(rates, TB, 100)
    measured(rates, WIFI, 190)
    assert rates.sort_by_rate("b", ADDRESSES, 1.0) == [TB, ETH, WIFI]
    measured(rates, ETH, 200)
    assert rates.sort_by_rate("b", ADDRESSES, 1.0) == [ETH, TB, WIFI]
    assert rates.sort_by_rate("c", ADDRESSES, 1.0) == [TB, ETH, WIFI]  # of another node nothing is known


def test_a_measurement_expires() -> None:
    rates = AddressStats()
    measured(rates, TB, 100)
    measured(rates, ETH, 900)
    assert rates.sort_by_rate("b", ADDRESSES, MEASUREMENT_TTL_S - 1)[0] == ETH
    assert rates.sort_by_rate("b", ADDRESSES, MEASUREMENT_TTL_S + 1)[0] == TB


def test_one_odd_measurement_does_not_make_an_average() -> None:
    rates = AddressStats()
    for _ in range(10):
        measured(rates, TB, 100)
    measured(rates, TB, 10)
    assert 70 * MIB < rates.bytes_per_s("b", TB, 0.0) < 100 * MIB


def test_a_failed_address_is_last_for_a_while_or_until_it_works() -> None:
    rates = AddressStats()
    rates.record_failure("b", TB, 0.0)
    assert rates.sort_by_rate("b", ADDRESSES, 1.0) == [ETH, WIFI, TB]
    assert rates.sort_by_rate("b", ADDRESSES, FAILED_BACKOFF_S + 1.0) == [TB, ETH, WIFI]
    measured(rates, TB, 100, now_s=2.0)
    assert rates.sort_by_rate("b", ADDRESSES, 3.0) == [TB, ETH, WIFI]


def test_a_few_bytes_show_an_address_works_but_give_no_rate() -> None:
    rates = AddressStats()
    rates.record_failure("b", TB, 0.0)
    rates.record("b", TB, MIN_BYTES - 1, 100.0, 1.0)
    assert rates.bytes_per_s("b", TB, 1.0) == 0.0
    assert rates.sort_by_rate("b", ADDRESSES, 1.0)[0] == TB


def test_only_small_requests_try_unmeasured_addresses() -> None:
    rates = AddressStats()
    measured(rates, TB, 100)
    assert rates.sort_by_rate("b", ADDRESSES, 1.0, MAX_TRIAL_BYTES) == [ETH, TB, WIFI]
    measured(rates, ETH, 10)
    assert rates.sort_by_rate("b", ADDRESSES, 1.0, MAX_TRIAL_BYTES)[0] == WIFI
    measured(rates, WIFI, 1000)
    assert rates.sort_by_rate("b", ADDRESSES, 1.0, MAX_TRIAL_BYTES) == [WIFI, TB, ETH]
    assert rates.sort_by_rate("b", ADDRESSES, 1.0, MAX_TRIAL_BYTES + 1)[0] == WIFI
    fresh = AddressStats()
    measured(fresh, TB, 100)
    assert fresh.sort_by_rate("b", ADDRESSES, 1.0, MAX_TRIAL_BYTES + 1)[0] == TB


STEPS = st.lists(
    st.tuples(st.sampled_from(ADDRESSES), st.sampled_from([None, 1.0, 10.0, 100.0]), st.floats(0, 30)), max_size=30
)


@given(STEPS, st.integers(0, 8 * MIB))
def test_whatever_was_measured_every_address_is_tried_once(
    steps: list[tuple[str, float | None, float]], size_bytes: int
) -> None:
    rates, now_s = AddressStats(), 0.0
    for address, mib_per_s, passed_s in steps:
        now_s += passed_s
        if mib_per_s is None:
            rates.record_failure("b", address, now_s)
        else:
            measured(rates, address, mib_per_s, now_s)
    assert sorted(rates.sort_by_rate("b", ADDRESSES, now_s, size_bytes)) == sorted(ADDRESSES)


def test_what_is_kept_is_bounded() -> None:
    rates = AddressStats()
    for n in range(MAX_ADDRESSES + 10):
        rates.record_failure(f"node-{n}", TB, 0.0)
    assert rates.sort_by_rate("node-0", (TB, ETH), 1.0) == [TB, ETH]  # forgotten
    assert rates.sort_by_rate(f"node-{MAX_ADDRESSES}", (TB, ETH), 1.0) == [ETH, TB]
    assert len(rates._known) == MAX_ADDRESSES
