"""Credentials for a node's data ports."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal_common.host.credentials import (
    TOKEN_LIFETIME_S,
    bearer,
    blob_token,
    blob_token_allows,
    derive,
    is_authorized,
    signed_query,
    signed_query_allows,
)


def shown(secret: str, purpose: str) -> dict[str, str]:
    return {name.lower(): value for name, value in bearer(secret, purpose).items()}


@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20))
def test_I12_only_the_same_secret_is_accepted(own: str, theirs: str) -> None:
    assert is_authorized(own, "blobs", shown(theirs, "blobs")) == (own == theirs)


def test_I12_a_key_for_one_purpose_opens_no_other() -> None:
    assert not is_authorized("secret", "blobs", shown("secret", "activations"))
    assert "secret" not in derive("secret", "blobs")


def test_I12_without_the_header_the_door_stays_shut() -> None:
    assert not is_authorized("secret", "blobs", {})
    assert not is_authorized("secret", "blobs", {"authorization": ""})


@given(st.text(alphabet=st.characters(categories=None), max_size=40))
def test_I12_no_header_however_odd_opens_or_breaks_the_door(header: str) -> None:
    assert not is_authorized("secret", "blobs", {"authorization": header})


def test_on_loopback_nothing_is_asked() -> None:
    assert is_authorized("", "blobs", {})
    assert bearer("", "blobs") == {}


@given(st.integers(0, 10**11), st.floats(0, 1e12))
def test_I12_a_signed_url_grants_one_blob_until_its_expiry(until_s: int, now_s: float) -> None:
    query = signed_query("secret", "ab" * 32, until_s)
    assert signed_query_allows("secret", "ab" * 32, query, now_s) == (now_s <= until_s)
    assert not signed_query_allows("secret", "cd" * 32, query, 0)
    assert not signed_query_allows("another", "ab" * 32, query, 0)
    assert not signed_query_allows("secret", "ab" * 32, {**query, "until": str(until_s + 1)}, 0)


@given(st.text(max_size=30), st.text(max_size=80))
def test_I12_no_other_query_grants_anything(until: str, key: str) -> None:
    assert not signed_query_allows("secret", "ab" * 32, {"until": until, "key": key}, 0)
    assert not signed_query_allows("secret", "ab" * 32, {}, 0)
    assert signed_query("", "ab" * 32, 5) == {} and not signed_query_allows(
        "", "ab" * 32, {"until": "5", "key": ""}, 0
    )


def test_a_blob_token_grants_one_blob_of_one_node_for_minutes() -> None:
    blob, other, now_s = "ab" * 32, "cd" * 32, 1_000_000.0
    headers = {k.lower(): v for k, v in blob_token("s", "a", blob, now_s).items()}
    assert blob_token_allows("s", "a", blob, headers, now_s)
    assert blob_token_allows("s", "a", blob, headers, now_s + TOKEN_LIFETIME_S)
    assert not blob_token_allows("s", "a", other, headers, now_s)
    assert not blob_token_allows("s", "b", blob, headers, now_s)
    assert not blob_token_allows("t", "a", blob, headers, now_s)
    assert not blob_token_allows("s", "a", blob, headers, now_s + 3 * TOKEN_LIFETIME_S)
    assert not blob_token_allows("s", "a", blob, headers, now_s - 3 * TOKEN_LIFETIME_S)


def test_a_malformed_blob_token_grants_nothing() -> None:
    for header in ("", "Shoal", "Shoal .", "Shoal ١٢.x", "Bearer 1.2", "Shoal 99999999999999.x"):
        assert not blob_token_allows("s", "a", "ab" * 32, {"authorization": header}, 1_000_000.0)
    assert blob_token_allows("", "a", "ab" * 32, {}, 1_000_000.0)
    assert blob_token("", "a", "ab" * 32, 1_000_000.0) == {}
