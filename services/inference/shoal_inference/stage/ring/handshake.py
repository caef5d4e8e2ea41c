"""How two neighbours prove to each other that they are that, in the same ring. Pure bytes; docs/wire-activations.md.

Both prove: the connector, that it is the predecessor; the acceptor, that it is no impostor on a reused port, before
a hidden state is sent to it. Nonces are fresh on both sides, so neither proof can be replayed.
"""

from __future__ import annotations

import hashlib
import hmac

import msgspec

from shoal_common.messages import DECODE_ERRORS
from shoal_inference.stage.errors import HandshakeRefused

MAGIC = b"SHLH\x01\x00\x00\x00"
NONCE_BYTES = 32
CHALLENGE_BYTES = len(MAGIC) + NONCE_BYTES
PROOF_BYTES = 32
MAX_HELLO_BYTES = 4096


class RingPlace(msgspec.Struct, frozen=True, kw_only=True):
    """One stage's place: the ring's name, its own rank, and the secret that it shares with each neighbour."""

    instance: str
    epoch: int
    rank: int
    stages: int
    successor_secret: bytes
    predecessor_secret: bytes

    @property
    def successor(self) -> int:
        """Rank of the stage this one sends to."""
        return (self.rank + 1) % self.stages

    @property
    def predecessor(self) -> int:
        """Rank of the stage this one receives from."""
        return (self.rank - 1) % self.stages


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """The connector's answer to a challenge, as JSON after a u16 length."""

    instance: str
    epoch: int
    rank: int
    to: int
    nonce: bytes
    proof: bytes


def _proof(place: RingPlace, label: bytes, nonces: bytes, sender: int, receiver: int) -> bytes:
    secret = place.successor_secret if sender == place.rank else place.predecessor_secret
    instance = place.instance.encode()
    numbers = b"".join(n.to_bytes(8, "little") for n in (len(instance), place.epoch, sender, receiver))
    return hmac.digest(secret, label + nonces + numbers + instance, hashlib.sha256)


def challenge(nonce: bytes) -> bytes:
    """What the acceptor says first."""
    return MAGIC + nonce


def read_challenge(data: bytes) -> bytes:
    """The acceptor's nonce; raises Refused."""
    if len(data) != CHALLENGE_BYTES or not data.startswith(MAGIC):
        raise HandshakeRefused(f"the peer sent {data[:8]!r}, not a challenge of this version")
    return data[len(MAGIC) :]


def hello(place: RingPlace, acceptor_nonce: bytes, own_nonce: bytes) -> bytes:
    """The connector's answer, with its length before it."""
    to = place.successor
    proof = _proof(place, b"connect", acceptor_nonce + own_nonce, place.rank, to)
    body = msgspec.json.encode(
        Hello(
            instance=place.instance,
            epoch=place.epoch,
            rank=place.rank,
            to=to,
            nonce=own_nonce,
            proof=proof,
        )
    )
    return len(body).to_bytes(2, "little") + body


def check_hello(place: RingPlace, acceptor_nonce: bytes, body: bytes) -> bytes:
    """The connector's nonce if it is this stage's predecessor in this ring; raises Refused saying what differs."""
    try:
        said = msgspec.json.decode(body, type=Hello)
    except DECODE_ERRORS as error:
        raise HandshakeRefused(f"its hello does not decode: {error}") from None
    # The claims are compared for the log's sake; only the proof is believed, and it covers this stage's own values.
    claims = (
        ("instance", said.instance, place.instance),
        ("epoch", said.epoch, place.epoch),
        ("rank", said.rank, place.predecessor),
        ("to", said.to, place.rank),
    )
    for name, theirs, ours in claims:
        if theirs != ours:
            raise HandshakeRefused(f"its {name} is {str(theirs)[:80]!r}, expected {ours!r}")
    expected = _proof(place, b"connect", acceptor_nonce + said.nonce, place.predecessor, place.rank)
    if len(said.nonce) != NONCE_BYTES or not hmac.compare_digest(expected, said.proof):
        raise HandshakeRefused("its proof does not match: it is not this stage's predecessor")
    return said.nonce


def welcome(place: RingPlace, acceptor_nonce: bytes, connector_nonce: bytes) -> bytes:
    """The acceptor's proof; after it frames may flow."""
    return _proof(place, b"accept", connector_nonce + acceptor_nonce, place.predecessor, place.rank)


def check_welcome(place: RingPlace, acceptor_nonce: bytes, own_nonce: bytes, proof: bytes) -> None:
    """Raises Refused unless the acceptor is this stage's successor in this ring."""
    expected = _proof(place, b"accept", own_nonce + acceptor_nonce, place.rank, place.successor)
    if not hmac.compare_digest(expected, proof):
        raise HandshakeRefused("its welcome does not match: another process may listen at the next stage's address")
