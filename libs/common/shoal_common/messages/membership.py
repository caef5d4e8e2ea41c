"""Who belongs to the cluster. The operator's node writes it; every node reads it."""

from __future__ import annotations

from shoal_common.messages import WireStruct


class Member(WireStruct):
    """A node that the operator let in: key `member.<node>` in `spec`, published by the operator's node."""

    node: str
    """The node."""
    certificate: str
    """PEM, from the cluster's authority. Its key signs, and agrees on secrets with other nodes."""
    nkeys: dict[str, str]
    """Public key on NATS of each of the node's users: its services, and `cli`."""
    joined_at_s: float = 0.0
    """When it joined."""


class JoinRequest(WireStruct):
    """`join.<invitation>`: let a node in."""

    node: str
    """The node's id."""
    version: str
    """Its version of Shoal."""
    nkeys: dict[str, str]
    """Public key on NATS of each of its users."""
    signing_request: str
    """PEM: the request for its certificate."""
    hosts: list[str] = []
    """Names and addresses of the machine, which the certificate names too."""


class JoinReply(WireStruct):
    """What a node needs in order to belong to the cluster."""

    cluster: str
    """The cluster's name."""
    certificate: str
    """The node's certificate, PEM."""
    nats: list[str]
    """URLs of the servers, best first."""
