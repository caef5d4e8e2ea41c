"""Who is let into the cluster. Pure: the operator's node acts on what these functions return."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence

import msgspec

from shoal_common.errors import BadInput, Denied, Refused
from shoal_common.identity.nkey import check_public_nkey
from shoal_common.identity.node_identity import USERS
from shoal_common.liveness.compatibility import are_compatible
from shoal_common.messages.membership import JoinRequest, Member
from shoal_common.names import check_node

MAX_HOSTS = 32
MAX_INVITATIONS = 64
"""That are open at once."""
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")


class Invitation(msgspec.Struct, frozen=True):
    """An invitation that somebody may still use."""

    id: str
    nkey: str
    """Public key of the NATS user who may only ask to join."""
    until_s: float
    """When it expires, seconds since 1970."""
    used_by: str = ""
    """The node that it let in. That node may ask again: the first answer may have been lost."""


def open_invitations(invitations: Sequence[Invitation], now_s: float) -> list[Invitation]:
    """Return those that have not expired."""
    return [i for i in invitations if i.until_s > now_s]


def check_join(
    request: JoinRequest, invitation: Invitation | None, members: Mapping[str, Member], version: str
) -> None:
    """Raise Denied, Refused or BadInput unless the node may join."""
    if invitation is None:
        raise Denied("this invitation has expired: ask for a new one with `shoal invite` on the operator's node")
    node = check_node(request.node)
    if set(request.nkeys) != set(USERS):
        raise BadInput(f"a node has the keys of {', '.join(USERS)}")
    if len({check_public_nkey(key) for key in request.nkeys.values()}) != len(USERS):
        raise BadInput("two services of a node cannot have one key")
    if not are_compatible(request.version, version):
        raise Refused(
            f"node {node} runs Shoal {request.version[:40]}, this cluster {version}: install the same version first"
        )
    before = members.get(node)
    same_node = before is not None and before.nkeys == request.nkeys
    if invitation.used_by and not (invitation.used_by == node and same_node):
        raise Denied(f"this invitation has let in node {invitation.used_by} already: ask for a new one")
    if before is not None and not same_node:
        raise Refused(
            f"a node {node} belongs to this cluster already: choose another name with --node, or first let it go "
            f"with `shoal node revoke {node}` on the operator's node"
        )
    others = {key for name, m in members.items() if name != node for key in m.nkeys.values()}
    if others & set(request.nkeys.values()):
        raise Refused("another node has one of these keys: a copied home needs an identity of its own")


def certificate_hosts(hosts: Sequence[str]) -> list[str]:
    """Return the names and addresses of a machine that its certificate may state. Raises BadInput."""
    if len(hosts) > MAX_HOSTS:
        raise BadInput(f"a machine states at most {MAX_HOSTS} names and addresses")
    return [_checked_host(host) for host in hosts]


def _checked_host(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not _HOST.fullmatch(host) or host.lower().endswith(".shoal"):
        raise BadInput(f"{host[:80]!r} is not a name of a machine")
    return host
