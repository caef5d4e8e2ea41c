"""A node joins a cluster, or leaves it: what `shoal join` and `shoal leave` do. Blocking."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from nats.errors import Error as NatsError
from nats.errors import NoRespondersError

from shoal_cli.membership.invite_code import FINGERPRINT_BYTES, InviteCode
from shoal_cli.membership.machine_hosts import machine_hosts
from shoal_cli.membership.permissions import join_inbox
from shoal_cli.node.node_plan import bracketed
from shoal_common import VERSION
from shoal_common.bus import subjects
from shoal_common.bus.connection import NatsLogin, connected, login_of
from shoal_common.config import CLUSTER_SECTION
from shoal_common.errors import Denied, Expired, Refused, Unavailable
from shoal_common.identity.certificates import fingerprint
from shoal_common.identity.node_identity import CLI, NodeIdentity
from shoal_common.identity.tls import client_context, unverified_context
from shoal_common.messages import encode
from shoal_common.messages.envelope import Empty
from shoal_common.messages.membership import JoinReply, JoinRequest
from shoal_common.rpc.request_reply import result_of
from shoal_common.settings_file import change_settings

T = TypeVar("T")

_TIMEOUT_S = 10.0
_ANSWER_S = 20.0
"""For the operator, who waits until the server has read its new configuration."""


def join(
    identity: NodeIdentity, home: Path, host: str, port: int, code: InviteCode, environ: Mapping[str, str]
) -> str:
    """Make this node a member of the cluster whose NATS is at an address; return the cluster's name.

    Raises Denied for a code that is wrong, used or expired, or a server that is not the one it is for; Refused,
    Unavailable.
    """
    if identity.is_member:
        raise Refused(
            f"this node belongs to a cluster already ({identity.directory}): leave it first with `shoal leave`"
        )
    authority = pinned_authority(host, port, code.fingerprint)
    identity.create()
    request = JoinRequest(
        node=identity.node,
        version=VERSION,
        nkeys=identity.public_nkeys(),
        signing_request=identity.signing_request(),
        hosts=machine_hosts(environ),
    )
    server = f"tls://{bracketed(host)}:{port}"
    login = NatsLogin(code.key, join_inbox(code.id), client_context(authority))
    reply = asyncio.run(_request(server, login, subjects.join(code.id), request, JoinReply))
    servers = list(dict.fromkeys([server, *reply.nats]))
    change_settings(home, {CLUSTER_SECTION: {"nats": servers}}, lambda _: None)
    identity.save({"ca.crt": authority.decode(), "node.crt": reply.certificate})
    return reply.cluster


def leave(identity: NodeIdentity, home: Path, servers: list[str]) -> str:
    """Take this node out of its cluster; return why the operator could not be told, or ""."""
    problem = ""
    try:
        asyncio.run(_request_any(servers, identity))
    except (Denied, Unavailable, Expired) as e:
        problem = e.message
    identity.remove()
    change_settings(home, {CLUSTER_SECTION: {"nats": None}}, lambda _: None)
    return problem


def pinned_authority(host: str, port: int, wanted: bytes) -> bytes:
    """Return the certificate (PEM) that a server sends of its authority, if it is the invitation's.

    Nothing is proved to the server here. Raises Denied, Unavailable.
    """
    context = unverified_context()  # the fingerprint decides, and only then is anything sent
    try:
        with (
            socket.create_connection((host, port), _TIMEOUT_S) as plain,
            context.wrap_socket(plain, server_hostname=host) as connection,
        ):
            chain = [ssl.DER_cert_to_PEM_cert(der).encode() for der in _chain(connection)]
    except ssl.SSLError as e:
        raise Denied(f"{host}:{port} is not the NATS server of a Shoal cluster: {e.reason or 'no TLS'}") from None
    except OSError as e:
        raise Unavailable(
            f"nothing answers at {host}:{port} ({e.strerror or type(e).__name__}): is `shoal up` running there, with "
            "--bind, and its port open in the firewall?"
        ) from None
    for pem in chain:
        if fingerprint(pem)[:FINGERPRINT_BYTES] == wanted:
            return pem
    raise Denied(f"the server at {host}:{port} is not the one that this invitation is for: check both")


def _chain(connection: ssl.SSLSocket) -> list[bytes]:
    # Public from Python 3.13; before that only the object below has it.
    if hasattr(connection, "get_unverified_chain"):
        return list(connection.get_unverified_chain())
    chain = connection._sslobj.get_unverified_chain()  # type: ignore[attr-defined]  # see above
    return [certificate.public_bytes(_DER) for certificate in chain or ()]


_DER = 2
"""`ssl._ssl.ENCODING_DER`."""


async def _request(server: str, login: NatsLogin, subject: str, request: object, kind: type[T]) -> T:
    try:
        async with connected([server], "shoal join", timeout_s=_TIMEOUT_S, login=login) as nats:
            message = await nats.client.request(subject, encode(request), timeout=_ANSWER_S)
    except Denied:
        raise Denied(
            "the cluster does not know this invitation, or it has expired: ask for a new one with `shoal invite` on "
            "the operator's node"
        ) from None
    except NoRespondersError:
        raise Unavailable("the operator's node does not answer: is its `shoal up` still running?") from None
    except NatsError as e:
        raise Unavailable(f"the operator's node did not answer ({type(e).__name__}): try again") from None
    return result_of(message.data, kind)


async def _request_any(servers: list[str], identity: NodeIdentity) -> None:
    login = login_of(identity, CLI)
    try:
        async with connected(servers, "shoal leave", timeout_s=_TIMEOUT_S, login=login) as nats:
            await nats.client.request(subjects.leave(identity.node), encode(Empty()), timeout=_TIMEOUT_S)
    except NatsError as e:
        raise Unavailable(f"the operator's node did not answer ({type(e).__name__})") from None
