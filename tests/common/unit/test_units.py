"""Sizes as people write and read them."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_common.errors import BadInput
from shoal_common.units import format_bytes, format_duration, format_rate, parse_bytes, parse_duration_s, parse_rate


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("0.0", 0),
        ("512B", 512),
        ("1kB", 1000),
        ("1KiB", 1024),
        ("100 MB", 100_000_000),
        ("200GB", 200_000_000_000),
        ("200gb", 200_000_000_000),
        ("200G", 200_000_000_000),
        ("200GiB", 200 * 2**30),
        ("1.5TiB", 3 * 2**39),
        (" 2 TB ", 2_000_000_000_000),
        ("0.1GB", 100_000_000),
    ],
)
def test_sizes_are_read_decimal_and_with_an_i_binary(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("90 s", 90), ("15min", 900), ("15m", 900), ("12H", 43200), ("7d", 604800)],
)
def test_durations_are_read(text: str, seconds: int) -> None:
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "d", "-1d", "1.5h", "7 days", "1w", "1" * 10])
def test_a_bad_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadInput, match="7d"):
        parse_duration_s(text)


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "1,5GB", "1e9", "NaN", "200 potatoes", "1iB", "1GBB", "٣GB", "1" * 30]
)
def test_a_bad_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadInput, match="200GB"):
        parse_bytes(text)


@given(st.decimals(0, 10**9, places=2).filter(bool) | st.integers(1, 10**9 - 1))
def test_a_number_without_a_unit_is_refused_with_the_units(number: Decimal | int) -> None:
    for parse, units in (
        (parse_bytes, "B, .*GB, .*GiB"),
        (parse_rate, "B/s, .*GB/s"),
        (parse_duration_s, "min, .*d"),
    ):
        if parse is parse_duration_s and isinstance(number, Decimal):
            continue  # durations are whole numbers
        with pytest.raises(BadInput, match=f"{number} has no unit: write .*{units}"):
            parse(str(number))


@given(st.integers(0, 10**15), st.sampled_from(["", "k", "M", "G", "T"]), st.booleans())
def test_a_size_times_its_unit_is_exact(number: int, prefix: str, binary: bool) -> None:
    unit = f"{prefix}{'i' if binary and prefix else ''}B"
    assert parse_bytes(f"{number}{unit}") == number * (1024 if binary else 1000) ** (
        "kMGT".find(prefix) + 1 if prefix else 0
    )


@given(st.integers(0, 10**17))
def test_a_size_shown_is_within_a_twentieth_of_the_size(size_bytes: int) -> None:
    assert parse_bytes(format_bytes(size_bytes)) == pytest.approx(size_bytes, rel=0.05)


@given(st.integers(0, 10**17))
def test_a_size_shown_is_short(size_bytes: int) -> None:
    assert len(format_bytes(size_bytes)) <= len("999.9 MB")


def test_durations_are_shown_in_the_unit_that_matters() -> None:
    assert [format_duration(s) for s in (0.4, 59.4, 59.6, 3599, 3600, 90061)] == [
        "0 s",
        "59 s",
        "1 min 00 s",
        "59 min 59 s",
        "1 h 00 min",
        "1 d 1 h",
    ]


def test_rates_are_sizes_a_second() -> None:
    assert [parse_rate(t) for t in ("20MB", "1.5 MiB/s", "1B/s", "0")] == [20_000_000, 1_572_864, 1, 0]
    assert format_rate(20_000_000) == "20.0 MB/s"
    for text in ("none", "fast", "-1", "20MB/h"):
        with pytest.raises(BadInput):
            parse_rate(text)
