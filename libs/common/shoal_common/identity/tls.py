"""TLS between the machines of a cluster: each end trusts the cluster's authority and nobody else.

A client names the node that it means (`server_hostname=node_host(node)`), whatever the address. TLS proves the
server; clients prove themselves inside it, by a key of NATS or a token.
"""

from __future__ import annotations

import ssl

from shoal_common.identity.node_identity import NodeIdentity


def client_context(authority: bytes) -> ssl.SSLContext:
    """Return the context for connecting to a node or to NATS of the cluster with this authority (PEM)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=authority.decode())
    return context


def unverified_context() -> ssl.SSLContext:
    """Return a context that trusts whoever answers: for a look at what a server shows to everybody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def server_context(identity: NodeIdentity) -> ssl.SSLContext:
    """Return the context for listening as this node."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(identity.certificate_file, identity.key_file)
    return context
