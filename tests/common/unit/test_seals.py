"""Seals: a node's signature that it hashed a whole blob counts for that blob, from members who are trusted."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_common.identity import seals
from shoal_common.identity.certificates import new_key
from shoal_common.identity.node_identity import NodeIdentity
from shoal_common.identity.seals import SealedList, SealKeeper
from shoal_common.messages.manifest import LeafListSeal
from tests.harness.identities import Authority

LIST = SealedList("ab" * 32, 7 << 20, "cd" * 32)
OTHERS = [
    msgspec.structs.replace(LIST, sha256="ac" * 32),
    msgspec.structs.replace(LIST, size_bytes=(7 << 20) + 1),
    msgspec.structs.replace(LIST, leaf_list_digest="ce" * 32),
]
KEY = new_key()


class Members:
    """A cluster of a, b and c, and what a trusts."""

    def __init__(self, directory: Path) -> None:
        self.authority = Authority(directory)
        self.identities = {n: self.authority.node(n) for n in "abc"}
        self.setting, self.distrusted = "cluster", set[str]()

    def keeper(self, identity: NodeIdentity | None) -> SealKeeper:
        """Return what a node makes of seals."""
        return SealKeeper(identity, self.authority.certificates.get, lambda: self.setting, lambda: self.distrusted)

    def seal_of(self, node: str, sealed: SealedList = LIST) -> LeafListSeal:
        """Return the seal of a node."""
        return seals.sign(self.identities[node].private_key, node, sealed, 1e9)

    def refusal(self, seal: LeafListSeal | None, sealed: SealedList = LIST) -> str:
        """Return why a does not take a seal."""
        return self.keeper(self.identities["a"]).refusal(seal, sealed)


@pytest.fixture
def members(tmp_path: Path) -> Members:
    return Members(tmp_path)


@given(st.sampled_from([LIST, *OTHERS]), st.sampled_from([LIST, *OTHERS]), st.integers(0, 1 << 40))
def test_a_seal_is_about_one_blob_size_list_and_time(signed: SealedList, asked: SealedList, at_s: int) -> None:
    seal = seals.sign(KEY, "a", signed, float(at_s))
    assert seals.is_signed(seal, asked, KEY.public_key()) == (signed == asked)
    for wrong in (
        msgspec.structs.replace(seal, node="b"),
        msgspec.structs.replace(seal, signed_at_s=at_s + 1),
        msgspec.structs.replace(seal, signature=seal.signature[:-1]),
    ):
        assert not seals.is_signed(wrong, signed, KEY.public_key())


@given(st.binary(max_size=100), st.integers(0, 1 << 40))
def test_a_seal_survives_its_text_form(signature: bytes, at_s: int) -> None:
    seal = LeafListSeal(node="a", signed_at_s=at_s, signature=signature)
    text = seals.to_text(seal)
    assert seals.from_text(text) == seal and text.isascii() and "\n" not in text


@given(st.text(max_size=1500) | st.binary(max_size=300).map(lambda b: b64encode(b).decode()))
def test_what_is_no_seal_is_none_and_no_error(text: str) -> None:
    seal = seals.from_text(text)
    assert seal is None or seals.from_text(seals.to_text(seal)) == seal
    assert seals.from_text("x" * (seals.MAX_SEAL_BYTES + 1)) is None


def test_the_seals_of_members_count_and_nobody_elses(members: Members, tmp_path: Path) -> None:
    assert members.refusal(members.seal_of("a")) == members.refusal(members.seal_of("b")) == ""
    assert members.refusal(None) == "it has no seal"
    stranger = Authority(tmp_path / "other").node("b")
    forged = seals.sign(stranger.private_key, "b", LIST, 1e9)
    assert members.refusal(forged) == "the seal of node b is not about this blob"
    nobody = msgspec.structs.replace(forged, node="z")
    assert members.refusal(nobody) == "its sealer z is not a member of this cluster"
    assert "is not a node id" in members.refusal(msgspec.structs.replace(forged, node="../a"))


def test_a_seal_under_another_nodes_name_is_refused(members: Members) -> None:
    of_b = members.seal_of("b")
    for name in ("a", "c"):
        assert "is not about this blob" in members.refusal(msgspec.structs.replace(of_b, node=name))


@pytest.mark.parametrize("other", OTHERS, ids=["blob", "size", "list"])
def test_a_seal_replayed_for_something_else_is_refused(members: Members, other: SealedList) -> None:
    for node in "ab":
        assert "is not about this blob" in members.refusal(members.seal_of(node), other)


def test_the_seal_of_a_revoked_member_counts_no_more(members: Members) -> None:
    seal = members.seal_of("b")
    del members.authority.certificates["b"]
    assert members.refusal(seal) == "its sealer b is not a member of this cluster"


def test_trust_is_none_or_named_nodes_and_always_oneself(members: Members) -> None:
    members.setting = "none"
    assert "trust_sealers is 'none'" in members.refusal(members.seal_of("b"))
    assert members.refusal(members.seal_of("a")) == ""
    members.setting = "b, d"
    assert members.refusal(members.seal_of("b")) == members.refusal(members.seal_of("a")) == ""
    assert members.refusal(members.seal_of("c")) == "trust_sealers does not name node c"


def test_a_sealer_that_has_lied_here_is_not_trusted_again(members: Members) -> None:
    members.distrusted = {"b"}
    assert members.refusal(members.seal_of("b")) == "node b has sealed a corrupt blob before"
    assert members.refusal(members.seal_of("c")) == ""


def test_without_an_identity_digests_count_as_before(members: Members) -> None:
    alone = members.keeper(None)
    assert not alone.signs and alone.sign(LIST, 1e9) is None
    assert alone.refusal(None, LIST) == ""
    for setting in ("none", "b"):
        members.setting = setting
        assert "cannot sign" in alone.refusal(None, LIST)


def test_a_nodes_own_seal_is_known_by_its_key(members: Members) -> None:
    keeper = members.keeper(members.identities["a"])
    seal = keeper.sign(LIST, 1e9)
    assert keeper.is_own(seal, LIST) and not keeper.is_own(seal, OTHERS[0])
    assert not keeper.is_own(msgspec.structs.replace(members.seal_of("b"), node="a"), LIST)
    assert not keeper.is_own(members.seal_of("b"), LIST) and not keeper.is_own(None, LIST)
