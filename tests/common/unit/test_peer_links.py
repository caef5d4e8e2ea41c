"""Which addresses of a node are used plainly, which inside TLS, and which not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal_common.identity.certificates import node_host
from shoal_common.identity.peer_links import PeerLinks
from shoal_common.messages.liveness import NodeAddress
from tests.harness.identities import Authority

FAR, NEAR = "10.0.0.1:7000", "127.0.0.1:7000"
NAMED = "far.example:7000"


@pytest.fixture(scope="module")
def member(tmp_path_factory: pytest.TempPathFactory) -> PeerLinks:
    return PeerLinks(Authority(tmp_path_factory.mktemp("a")).node("a"))


@pytest.mark.parametrize("kind", ["", "ethernet", "loopback"])
@pytest.mark.parametrize("address", [FAR, NAMED, "[fd00::1]:7000", "[::ffff:10.0.0.1]:7000"])
def test_a_published_key_cannot_take_the_encryption_away(member: PeerLinks, address: str, kind: str) -> None:
    plain = NodeAddress(address=address, kind=kind)
    encrypted = NodeAddress(address=address, kind=kind, tls=True)
    assert member.usable([plain, encrypted]) == [encrypted]
    tls = member.tls("b", encrypted)
    assert tls is not None and tls[1] == node_host("b") and tls[0].check_hostname


def test_loopback_speaks_what_it_publishes(member: PeerLinks) -> None:
    plain, encrypted = NodeAddress(address=NEAR), NodeAddress(address=NEAR, tls=True)
    assert member.usable([plain, encrypted]) == [plain, encrypted]
    assert member.tls("b", plain) is None and member.tls("b", encrypted) is not None


def test_a_node_that_need_not_encrypt_follows_what_is_published(tmp_path: Path) -> None:
    links = PeerLinks(Authority(tmp_path).node("a"), may_be_plain=True)
    plain, encrypted = NodeAddress(address=FAR), NodeAddress(address=FAR, tls=True)
    assert links.usable([plain, encrypted]) == [plain, encrypted]
    assert links.tls("b", plain) is None and links.tls("b", encrypted) is not None


def test_outside_a_cluster_no_certificate_can_be_checked() -> None:
    links = PeerLinks(None)
    plain, encrypted = NodeAddress(address=NEAR), NodeAddress(address=NEAR, tls=True)
    assert links.usable([plain, encrypted]) == [plain]
