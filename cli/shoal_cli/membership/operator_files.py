"""The operator's files, on the node that started the cluster. They are the truth about who belongs to it. Blocking.

<home>/operator/
  operator.nk        the operator's key on NATS: it may do everything
  ca.key  ca.crt     the certificate authority
  nats.key nats.crt  the NATS server's certificate, with that of the authority
  members.json       who belongs to the cluster
  invitations.json   who may still ask to join

Whoever has a copy of this directory is the operator.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from shoal_cli.membership.admission import (
    MAX_INVITATIONS,
    Invitation,
    certificate_hosts,
    check_join,
    open_invitations,
)
from shoal_cli.membership.invite_code import InviteCode, new_code
from shoal_common import VERSION
from shoal_common.errors import BadInput, BadMessage, NotFound, Refused
from shoal_common.host.file_kinds import read_text_file
from shoal_common.host.private_files import make_private_directory, replace_private
from shoal_common.identity import certificates
from shoal_common.identity.nkey import Nkey
from shoal_common.identity.node_identity import NodeIdentity
from shoal_common.messages import WireStruct, decode, encode
from shoal_common.messages.membership import JoinRequest, Member

T = TypeVar("T")


class _Members(WireStruct):
    members: dict[str, Member] = {}


class _Invitations(WireStruct):
    invitations: list[Invitation] = []


class OperatorFiles:
    """The operator's directory in a home."""

    def __init__(self, home: Path) -> None:
        self.directory = home / "operator"
        self.nats_certificate_file = self.directory / "nats.crt"
        self.nats_key_file = self.directory / "nats.key"
        self._authority_file = self.directory / "ca.crt"
        self._authority_key_file = self.directory / "ca.key"
        self._members_file = self.directory / "members.json"
        self._invitations_file = self.directory / "invitations.json"

    @property
    def exists(self) -> bool:
        """Whether this home is the operator's."""
        return self._members_file.exists()

    def create(self, identity: NodeIdentity, hosts: Sequence[str]) -> None:
        """Start a cluster whose first member is this node; at later starts, renew what states its addresses."""
        make_private_directory(self.directory)
        identity.create()
        if not self._authority_key_file.exists() or not self._authority_file.exists():
            key, authority = certificates.create_authority(identity.node)
            replace_private(self._authority_key_file, certificates.key_to_pem(key))
            replace_private(self._authority_file, authority)
        if not self._operator_file.exists():
            replace_private(self._operator_file, f"{Nkey.create().text}\n".encode())
        self._certify_nats(identity.node, hosts)
        certificate = self._issue(identity.signing_request(), identity.node, hosts)
        identity.save({"ca.crt": self.authority.decode(), "node.crt": certificate})
        self._save_member(self._member(identity.node, certificate, identity.public_nkeys()))

    @property
    def authority(self) -> bytes:
        """The authority's certificate (PEM)."""
        return self._read(self._authority_file).encode()

    @property
    def nkey(self) -> Nkey:
        """The operator's key on NATS."""
        return Nkey.from_text(self._read(self._operator_file).strip())

    def members(self) -> dict[str, Member]:
        """Return who belongs to the cluster, by node."""
        return self._load(self._members_file, _Members).members

    def invitations(self) -> list[Invitation]:
        """Return who may ask to join."""
        return open_invitations(self._load(self._invitations_file, _Invitations).invitations, time.time())

    def invite(self, lifetime_s: float) -> InviteCode:
        """Return a new code that lets one node in. Raises Refused if too many are open."""
        invitations = self.invitations()
        if len(invitations) >= MAX_INVITATIONS:
            raise Refused(f"{MAX_INVITATIONS} invitations are open already: wait until one expires")
        code = new_code(certificates.fingerprint(self.authority))
        self._save_invitations([*invitations, Invitation(code.id, code.key.public, time.time() + lifetime_s)])
        return code

    def admit(self, invitation_id: str, request: JoinRequest) -> Member:
        """Make a node a member, or return it if it is one by this invitation. Raises Denied, Refused, BadInput."""
        invitations, members = self.invitations(), self.members()
        invitation = next((i for i in invitations if i.id == invitation_id), None)
        check_join(request, invitation, members, VERSION)
        assert invitation is not None
        certificate = self._issue(request.signing_request, request.node, certificate_hosts(request.hosts))
        member = self._member(request.node, certificate, request.nkeys)
        # The member first: an invitation that is used and let nobody in would have to be asked for again.
        self._save_member(member)
        used = Invitation(invitation.id, invitation.nkey, invitation.until_s, request.node)
        self._save_invitations([used if i.id == used.id else i for i in invitations])
        return member

    def remove(self, node: str, operator_node: str) -> None:
        """Take a node out of the cluster. Raises NotFound, or Refused for the operator's own node."""
        members = self.members()
        if node == operator_node:
            raise Refused(f"node {node} runs the cluster's NATS: the cluster ends with it")
        if node not in members:
            raise NotFound(f"node {node[:80]!r} does not belong to this cluster; {', '.join(members)} do")
        del members[node]
        replace_private(self._members_file, encode(_Members(members=members)))
        # What it was invited by would let it ask again.
        self._save_invitations([i for i in self.invitations() if i.used_by != node])

    @property
    def _operator_file(self) -> Path:
        return self.directory / "operator.nk"

    def _issue(self, request: str, node: str, hosts: Sequence[str]) -> str:
        key = certificates.key_from_pem(self._read(self._authority_key_file).encode())
        return certificates.issue(key, self.authority, request, node, hosts)

    def _certify_nats(self, node: str, hosts: Sequence[str]) -> None:
        if not self.nats_key_file.exists():
            replace_private(self.nats_key_file, certificates.key_to_pem(certificates.new_key()))
        key = certificates.key_from_pem(self._read(self.nats_key_file).encode())
        certificate = self._issue(certificates.signing_request(key, node), node, [certificates.NATS_HOST, *hosts])
        # With the authority's: whoever joins finds there what the invitation's fingerprint is of.
        replace_private(self.nats_certificate_file, certificate.encode() + self.authority)

    def _member(self, node: str, certificate: str, nkeys: dict[str, str]) -> Member:
        before = self.members().get(node)
        joined_at_s = before.joined_at_s if before else round(time.time(), 1)
        return Member(node=node, certificate=certificate, nkeys=nkeys, joined_at_s=joined_at_s)

    def _save_member(self, member: Member) -> None:
        replace_private(self._members_file, encode(_Members(members={**self.members(), member.node: member})))

    def _save_invitations(self, invitations: list[Invitation]) -> None:
        replace_private(self._invitations_file, encode(_Invitations(invitations=invitations)))

    def _load(self, path: Path, kind: type[T]) -> T:
        if not path.exists():
            return kind()
        try:
            return decode(read_text_file(path).encode(), kind)
        except BadMessage:
            raise BadInput(f"{path} is damaged: put it back from a copy of {self.directory}") from None

    def _read(self, path: Path) -> str:
        try:
            return read_text_file(path)
        except FileNotFoundError:
            raise BadInput(f"{path} is missing: put it back from a copy of {self.directory}") from None
