"""How this node speaks to a data port of another: inside TLS, or plainly.

A port publishes what it speaks with each of its addresses (`NodeAddress.tls`). Whoever can write that key must not be
able to take the encryption away, so an address that does not encrypt is used only where the bytes do not leave this
machine, or where this node's own setting says that they need not be encrypted. Which node answers is decided by its
certificate, never by the address.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable

from shoal_common.host.addresses import host_of
from shoal_common.identity.certificates import node_host
from shoal_common.identity.node_identity import NodeIdentity
from shoal_common.identity.tls import client_context
from shoal_common.messages.liveness import NodeAddress


class PeerLinks:
    """Which addresses of other nodes may be used, and how. `may_be_plain`: what this node's own setting says."""

    def __init__(self, identity: NodeIdentity | None, may_be_plain: bool = False) -> None:
        self._may_be_plain = may_be_plain or identity is None
        self._context = client_context(identity.authority) if identity else None

    def usable(self, links: Iterable[NodeAddress]) -> list[NodeAddress]:
        """Return the links that may be used."""
        return [link for link in links if self.is_usable(link)]

    def is_usable(self, link: NodeAddress) -> bool:
        """Return whether a link may be used."""
        if link.tls:
            return self._context is not None
        return self._may_be_plain or is_on_loopback(link)

    def tls(self, node: str, link: NodeAddress) -> tuple[ssl.SSLContext, str] | None:
        """Return the context and the host name to ask for; None to speak plainly."""
        return (self._context, node_host(node)) if link.tls and self._context else None


def is_on_loopback(link: NodeAddress) -> bool:
    """Return whether a link leads to this machine, whatever its publisher says of it."""
    ip = host_of(link.address)
    return ip is not None and ip.is_loopback
