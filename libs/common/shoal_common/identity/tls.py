"""TLS between the machines of a cluster: each end trusts the cluster's authority and nobody else.

A client names the node that it means (`server_hostname=node_host(node)`), whatever the address. TLS proves the
server; clients prove themselves inside it, by a key of NATS or a token.
"""

from __future__ import annotations

import os
import ssl
from typing import Protocol


class CertificateFiles(Protocol):
    """The files with which a node listens (`NodeIdentity`)."""

    @property
    def certificate_file(self) -> str | os.PathLike[str]:
        """The node's certificate."""

    @property
    def key_file(self) -> str | os.PathLike[str]:
        """Its key."""


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


def tls_error(error: ssl.SSLError) -> str:
    """Return what is wrong, without the library's punctuation."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not that node's ({error.verify_message})"
    return (error.reason or str(error)).replace("_", " ").lower()


def server_context(files: CertificateFiles) -> ssl.SSLContext:
    """Return the context for listening as a node. Blocking."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # nobody resumes a session, and nothing comes before the first answer
    context.load_cert_chain(files.certificate_file, files.key_file)
    return context
