"""The part of nats-server's configuration that says who may do what. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from shoal_cli.membership.admission import Invitation
from shoal_cli.membership.permissions import OPERATOR, Permissions, invitation_permissions, permissions
from shoal_common.messages.membership import Member

_HANDSHAKE_TIMEOUT_S = 5


_PROBE = Permissions(publish=("_INBOX.probe",), subscribe=("_INBOX.probe",))


def users_configuration(
    operator_nkey: str, members: Mapping[str, Member], invitations: Sequence[Invitation], probe_nkey: str = ""
) -> str:
    """Return the block `authorization`: the operator, each member's users, and who may ask to join.

    `probe_nkey` is a user of this version alone: once it is let in, the server has read it.
    """
    users = [
        _user(operator_nkey, OPERATOR),
        *(
            _user(key, permissions(user, node))
            for node, m in sorted(members.items())
            for user, key in m.nkeys.items()
        ),
        *(_user(i.nkey, invitation_permissions(i.id)) for i in invitations),
        *([_user(probe_nkey, _PROBE)] if probe_nkey else []),
    ]
    return "authorization {\n  users: [\n" + "\n".join(users) + "\n  ]\n}\n"


def tls_configuration(certificate: Path, key: Path) -> str:
    """Return the block `tls`. A client begins with TLS: nothing at all is sent in the clear."""
    return (
        f"tls {{\n  cert_file: {json.dumps(str(certificate))}\n  key_file: {json.dumps(str(key))}\n"
        f"  handshake_first: true\n  timeout: {_HANDSHAKE_TIMEOUT_S}\n}}\n"
    )


def _user(nkey: str, allowed: Permissions) -> str:
    rights = {"publish": {"allow": allowed.publish}, "subscribe": {"allow": allowed.subscribe}}
    return f"    {{ nkey: {nkey}, permissions: {json.dumps(rights)} }}"
