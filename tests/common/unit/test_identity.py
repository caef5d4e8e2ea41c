"""Keys on NATS, certificates, and the secrets that two nodes share."""

from __future__ import annotations

import ssl
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_common.errors import BadInput, Denied
from shoal_common.identity import certificates
from shoal_common.identity.certificates import issue, node_host, public_key_of
from shoal_common.identity.nkey import Nkey, check_public_nkey, is_signed_by
from shoal_common.identity.node_identity import NodeIdentity, load_identity
from shoal_common.identity.peer_secrets import PeerSecrets
from shoal_common.identity.tls import client_context, server_context
from tests.harness.identities import Authority

# From the documentation of nkeys: a user's seed and its public key.
SEED = "SUACSSL3UAHUDXKFSNVUZRF5UHPMWZ6BFDTJ7M6USDXIEDNPPQYYYCU3VY"
PUBLIC = "UDXU4RCSJNZOIQHZNWXHXORDPRTGNJAHAHFRGZNEEJCPQTT2M7NLCNF4"


@pytest.fixture
def cluster(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def test_an_nkey_has_the_text_that_NATS_gives_it() -> None:
    key = Nkey.from_text(SEED)
    assert (key.text, key.public) == (SEED, PUBLIC)
    assert check_public_nkey(PUBLIC) == PUBLIC


@given(st.text(max_size=70) | st.just(PUBLIC) | st.just(SEED[:-1]))
def test_what_is_no_seed_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(BadInput) as error:
        Nkey.from_text(text)
    assert len(text) < 6 or text not in error.value.message


@given(st.text(max_size=70))
def test_a_signature_holds_for_one_nonce_and_one_key(nonce: str) -> None:
    key = Nkey.create()
    assert is_signed_by(key.public, nonce, key.sign(nonce))
    assert not is_signed_by(key.public, f"{nonce}.", key.sign(nonce))
    assert not is_signed_by(PUBLIC, nonce, key.sign(nonce))


def test_I12_the_files_of_an_identity_are_private_and_kept(cluster: Authority) -> None:
    identity = cluster.node("a")
    public = identity.public_nkeys()
    assert len(set(public.values())) == 7
    assert {stat.S_IMODE(f.stat().st_mode) for f in identity.directory.iterdir()} == {0o600}
    assert stat.S_IMODE(identity.directory.stat().st_mode) == 0o700
    again = load_identity(cluster.directory / "a", "a")
    assert again is not None
    again.create()
    assert again.public_nkeys() == public


def test_a_node_that_left_has_no_identity(cluster: Authority) -> None:
    identity = cluster.node("a")
    identity.remove()
    assert load_identity(cluster.directory / "a", "a") is None
    assert list(identity.directory.iterdir()) == []


def test_a_missing_or_damaged_key_is_named_without_its_text(cluster: Authority) -> None:
    identity = cluster.node("a")
    path = identity.directory / "storage.nk"
    path.write_text(SEED[:-2])
    with pytest.raises(BadInput, match=r"storage\.nk.*put the file back") as error:
        identity.nkey("storage")
    assert SEED[:10] not in error.value.message
    path.unlink()
    with pytest.raises(BadInput, match=r"storage\.nk is missing"):
        identity.nkey("storage")


def test_a_certificate_is_of_one_node_and_one_authority(cluster: Authority, tmp_path: Path) -> None:
    a = cluster.node("a")
    assert public_key_of(a.certificate, cluster.certificate, "a") == a.private_key.public_key()
    with pytest.raises(Denied, match="not that of node b"):
        public_key_of(a.certificate, cluster.certificate, "b")
    with pytest.raises(Denied, match="not from this cluster"):
        public_key_of(Authority(tmp_path / "other").node("a").certificate, cluster.certificate, "a")
    with pytest.raises(Denied, match="not from this cluster"):
        public_key_of("garbage", cluster.certificate, "a")


def test_a_request_that_is_not_signed_by_its_key_is_refused(cluster: Authority) -> None:
    request = cluster.node("a").signing_request()
    for wrong in ("", "garbage", request[: len(request) // 2], request * 60):
        with pytest.raises(BadInput, match="request for a certificate"):
            issue(cluster.key, cluster.certificate, wrong, "a", [])


def test_two_nodes_share_a_secret_that_no_third_one_has(cluster: Authority) -> None:
    a, b, c = (cluster.secrets(cluster.node(n)) for n in "abc")
    assert len(a.shared_with("b")) == 64
    assert a.shared_with("b") == b.shared_with("a")
    assert len({a.shared_with("b"), a.shared_with("c"), b.shared_with("c"), c.shared_with("c")}) == 4


def test_a_node_that_is_no_member_shares_nothing(cluster: Authority) -> None:
    a = cluster.secrets(cluster.node("a"))
    with pytest.raises(Denied, match="not a member"):
        a.shared_with("b")
    cluster.node("b")
    assert a.shared_with("b")
    del cluster.certificates["b"]
    with pytest.raises(Denied, match="not a member"):
        a.shared_with("b")
    assert PeerSecrets(None, cluster.certificates.get).shared_with("b") == ""


def handshake(server: NodeIdentity, client: NodeIdentity, host: str) -> None:
    """Shake hands in memory. Raises ssl.SSLError."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    at_client = client_context(client.authority).wrap_bio(to_client, to_server, server_hostname=host)
    at_server = server_context(server).wrap_bio(to_server, to_client, server_side=True)
    for side in (at_client, at_server, at_client, at_server):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue


def test_TLS_proves_the_node_that_was_meant(cluster: Authority, tmp_path: Path) -> None:
    a, b = cluster.node("a"), cluster.node("b")
    handshake(a, b, node_host("a"))
    handshake(a, b, "127.0.0.1")
    for host in (node_host("b"), certificates.NATS_HOST, "127.0.0.2"):
        with pytest.raises(ssl.SSLCertVerificationError):
            handshake(a, b, host)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(Authority(tmp_path / "other").node("a"), b, node_host("a"))
