"""Who may talk to a node's data ports."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal_common.credentials import allowed, bearer, derive


def shown(secret: str, purpose: str) -> dict[str, str]:
    return {name.lower(): value for name, value in bearer(secret, purpose).items()}


@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20))
def test_I12_only_the_same_secret_opens(mine: str, theirs: str) -> None:
    assert allowed(mine, "blobs", shown(theirs, "blobs")) == (mine == theirs)


def test_I12_a_key_for_one_purpose_opens_no_other() -> None:
    assert not allowed("secret", "blobs", shown("secret", "activations"))
    assert "secret" not in derive("secret", "blobs")


def test_I12_without_the_header_the_door_stays_shut() -> None:
    assert not allowed("secret", "blobs", {})
    assert not allowed("secret", "blobs", {"authorization": ""})


@given(st.text(alphabet=st.characters(categories=None), max_size=40))
def test_I12_no_header_however_odd_opens_or_breaks_the_door(header: str) -> None:
    assert not allowed("secret", "blobs", {"authorization": header})


def test_on_loopback_nothing_is_asked() -> None:
    assert allowed("", "blobs", {})
    assert bearer("", "blobs") == {}
