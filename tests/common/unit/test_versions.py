"""Which versions are compatible."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_common import VERSION
from shoal_common.liveness.compatibility import are_compatible, compatibility_version

numbers = st.integers(0, 999_999_999)
dotted_identifiers = st.from_regex(r"[0-9A-Za-z-]{1,8}(\.[0-9A-Za-z-]{1,8}){0,2}", fullmatch=True)
tails = st.one_of(st.just(""), dotted_identifiers.map("-{}".format), dotted_identifiers.map("+{}".format))
versions = st.builds("{}.{}.{}{}".format, numbers, numbers, numbers, tails)
texts = st.one_of(st.text(max_size=30), versions)


@given(st.integers(1, 10**8), numbers, numbers, numbers, numbers, tails)
def test_from_1_on_the_major_decides_alone(m: int, a: int, b: int, c: int, d: int, tail: str) -> None:
    assert are_compatible(f"{m}.{a}.{b}{tail}", f"{m}.{c}.{d}")
    assert not are_compatible(f"{m}.{a}.{b}", f"{m + 1}.{a}.{b}{tail}")


@given(st.integers(0, 10**8), numbers, numbers, tails)
def test_while_major_is_0_the_minor_counts_as_major(minor: int, a: int, b: int, tail: str) -> None:
    assert are_compatible(f"0.{minor}.{a}{tail}", f"0.{minor}.{b}")
    assert not are_compatible(f"0.{minor}.{a}", f"0.{minor + 1}.{a}{tail}")
    assert not are_compatible(f"0.{minor}.{a}", f"{minor or 1}.{minor}.{a}")


@given(texts, texts, texts)
def test_it_makes_no_difference_who_asks_and_there_are_no_chains(a: str, b: str, c: str) -> None:
    assert are_compatible(a, b) == are_compatible(b, a)
    if are_compatible(a, b) and are_compatible(b, c):
        assert are_compatible(a, c)


@given(versions)
def test_every_version_works_with_itself(version: str) -> None:
    assert are_compatible(version, version)


@pytest.mark.parametrize(
    "text",
    [
        *("", "1", "1.2", "v1.2.3", "1.2.3.4", "01.2.3", "1.02.3", "1.2.3-", "1.2.3+", "1.2.3 ", "1.2.3\n", "-1.0.0"),
        *("\u0661.2.3", "9" * 5000 + ".0.0", "1.2.3-" + "a" * 5000, "latest"),
    ],
)
def test_a_malformed_version_is_compatible_with_nothing(text: str) -> None:
    assert compatibility_version(text) is None
    assert not are_compatible(text, text)
    assert not are_compatible(text, VERSION)


def test_ours_is_a_version() -> None:
    assert are_compatible(VERSION, VERSION)
