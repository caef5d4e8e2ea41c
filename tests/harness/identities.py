"""A cluster's authority for tests, and the nodes that it lets in.

The NATS of a test that has members speaks TLS, as they expect, but asks for no credentials: identities are for the
ports between nodes here.
"""

from __future__ import annotations

from pathlib import Path

from shoal_common.bus.keys import member_key
from shoal_common.bus.kv_bucket import Buckets
from shoal_common.identity.certificates import NATS_HOST, create_authority, issue
from shoal_common.identity.node_identity import NodeIdentity
from shoal_common.identity.peer_secrets import PeerSecrets
from shoal_common.identity.peer_tokens import PeerTokens
from shoal_common.messages.membership import Member


class Authority:
    """The authority of one cluster, and its members, whose homes are in one directory unless given."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.key, self.certificate = create_authority("test")
        self.certificates: dict[str, str] = {}
        """Of each member, by node."""

    def node(self, name: str, home: Path | None = None, host: str = "127.0.0.1") -> NodeIdentity:
        """Make a node a member. Its certificate names this host too."""
        identity = NodeIdentity(home or self.directory / name, name)
        identity.create()
        pem = issue(self.key, self.certificate, identity.signing_request(), name, [host])
        identity.save({"ca.crt": self.certificate.decode(), "node.crt": pem})
        self.certificates[name] = pem
        return identity

    def operator(self, directory: Path) -> NodeIdentity:
        """Return the identity of the node that runs NATS, which is no member here."""
        identity = self.node("operator", directory / "operator", NATS_HOST)
        del self.certificates[identity.node]
        return identity

    def secrets(self, identity: NodeIdentity) -> PeerSecrets:
        """Return what a member shares with the others."""
        return PeerSecrets(identity, self.certificates.get)

    def tokens(self, identity: NodeIdentity) -> PeerTokens:
        """Return the tokens of a member."""
        return PeerTokens(identity.node, self.secrets(identity))

    async def publish(self, buckets: Buckets) -> None:
        """Publish the members, as the operator's node does."""
        for node, certificate in self.certificates.items():
            member = Member(node=node, certificate=certificate, nkeys={})
            await buckets.spec.put(member_key(node), member)

    async def revoke(self, buckets: Buckets, node: str) -> None:
        """Turn a member away."""
        del self.certificates[node]
        await buckets.spec.delete(member_key(node))
