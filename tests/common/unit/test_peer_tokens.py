"""Tokens for the ports between nodes: who asks, whom, for what, until when."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_common.errors import Denied
from shoal_common.identity.peer_secrets import PeerSecrets
from shoal_common.identity.peer_tokens import HEALTH_NAME, LIFETIME_S, PROBE_NAME, PeerTokens
from tests.harness.identities import Authority

BLOB, OTHER, NOW_S = "ab" * 32, "cd" * 32, 1_000_000.0
OUTSIDE = PeerTokens("a", PeerSecrets(None, lambda _: None))


class Members:
    """Three members of a cluster."""

    def __init__(self, directory: Path) -> None:
        self.authority = Authority(directory)
        self.identities = {node: self.authority.node(node) for node in "abc"}
        self.a, self.b, self.c = (self.authority.tokens(identity) for identity in self.identities.values())


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Members:
    return Members(tmp_path_factory.mktemp("members"))


def sent(headers: dict[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def test_I12_a_token_is_of_one_node_for_one_blob_of_another(members: Members) -> None:
    token = sent(members.a.token("b", BLOB, NOW_S))
    assert members.b.allows(BLOB, token, NOW_S) and members.b.allows(BLOB, token, NOW_S + LIFETIME_S)
    assert not members.b.allows(OTHER, token, NOW_S)
    assert not members.c.allows(BLOB, token, NOW_S)
    assert not members.a.allows(BLOB, token, NOW_S)
    for late_s in (3 * LIFETIME_S, -3 * LIFETIME_S):
        assert not members.b.allows(BLOB, token, NOW_S + late_s)


def test_I12_a_token_does_not_serve_another_name(members: Members) -> None:
    value = members.a.token("b", BLOB, NOW_S)["Authorization"]
    assert value.startswith("Shoal a.")
    stolen = {"authorization": value.replace("Shoal a.", "Shoal c.")}
    assert not members.b.allows(BLOB, stolen, NOW_S)


def test_I12_a_revoked_member_and_a_stranger_are_refused_alike(tmp_path: Path) -> None:
    members = Members(tmp_path)
    token = sent(members.c.token("b", BLOB, NOW_S))
    assert members.b.allows(BLOB, token, NOW_S)
    del members.authority.certificates["c"]
    assert not members.b.allows(BLOB, token, NOW_S)
    with pytest.raises(Denied, match="not a member"):
        members.b.token("c", BLOB, NOW_S)
    stranger = Authority(tmp_path / "elsewhere")
    other = stranger.node("c")
    stranger.certificates["b"] = members.identities["b"].certificate
    with pytest.raises(Denied):
        stranger.tokens(other).token("b", BLOB, NOW_S)


@given(
    st.text(alphabet=st.characters(categories=None), max_size=60)
    | st.builds("Shoal {}".format, st.text(alphabet=st.characters(categories=None), max_size=40))
    | st.builds("Shoal {}.{}.{}".format, st.sampled_from("abc"), st.integers(0, 2_000_000), st.text(max_size=64))
)
def test_I12_no_header_however_odd_opens_or_breaks_the_door(members: Members, header: str) -> None:
    assert not members.b.allows(BLOB, {"authorization": header}, NOW_S)
    assert not members.b.allows(BLOB, {}, NOW_S)


@pytest.mark.parametrize(
    "token", ["", ".", "a", "a.", "a..x", "a.١٢.x", "a.99999999999999.x", "A.1000000.x", "../a.1.x"]
)
def test_I12_a_malformed_token_grants_nothing(members: Members, token: str) -> None:
    for now_s in (NOW_S, 0.0):
        assert not members.b.allows(BLOB, {"authorization": f"Shoal {token}"}, now_s)


def test_outside_a_cluster_nothing_is_asked() -> None:
    assert not OUTSIDE.are_required and OUTSIDE.allows(BLOB, {}, NOW_S)
    assert OUTSIDE.token("b", BLOB, NOW_S) == {} == OUTSIDE.signed_query("b", BLOB, 5)
    assert not OUTSIDE.query_allows(BLOB, {"node": "a", "until": "5", "key": ""}, 0)


def test_who_serves_no_peers_answers_itself_and_for_its_health(members: Members) -> None:
    b = members.identities["b"]
    closed = PeerTokens("b", members.authority.secrets(b), serves_peers=False)
    for name in (BLOB, PROBE_NAME):
        assert not closed.allows(name, sent(members.a.token("b", name, NOW_S)), NOW_S)
        assert closed.allows(name, sent(closed.token("b", name, NOW_S)), NOW_S)
    assert closed.allows(HEALTH_NAME, sent(members.a.token("b", HEALTH_NAME, NOW_S)), NOW_S)
    assert not closed.query_allows(BLOB, members.a.signed_query("b", BLOB, 2_000_000), NOW_S)


@given(st.integers(0, 10**11), st.floats(0, 1e12))
def test_I12_a_signed_url_grants_one_blob_until_its_expiry(members: Members, until_s: int, now_s: float) -> None:
    query = members.a.signed_query("b", BLOB, until_s)
    assert members.b.query_allows(BLOB, query, now_s) == (now_s <= until_s)
    assert not members.b.query_allows(OTHER, query, 0)
    assert not members.c.query_allows(BLOB, query, 0)
    assert not members.b.query_allows(BLOB, {**query, "until": str(until_s + 1)}, 0)
    assert not members.b.query_allows(BLOB, {**query, "node": "c"}, 0)


@given(st.text(max_size=30), st.text(max_size=30), st.text(max_size=80))
def test_I12_no_other_query_grants_anything(members: Members, node: str, until: str, key: str) -> None:
    assert not members.b.query_allows(BLOB, {"node": node, "until": until, "key": key}, 0)
    assert not members.b.query_allows(BLOB, {"node": "a", "until": "5", "key": key}, 0)
    assert not members.b.query_allows(BLOB, {}, 0)


def test_a_token_opens_no_url_and_a_url_no_header(members: Members) -> None:
    scheme, _, token = members.a.token("b", BLOB, NOW_S)["Authorization"].partition(" ")
    node, until, mac = token.split(".")
    assert scheme == "Shoal" and not members.b.query_allows(BLOB, {"node": node, "until": until, "key": mac}, NOW_S)
    query = members.a.signed_query("b", BLOB, int(NOW_S) + 60)
    header = f"Shoal {query['node']}.{query['until']}.{query['key']}"
    assert not members.b.allows(BLOB, {"authorization": header}, NOW_S)
