"""A node's identity: the files in `<home>/identity`, made where the node lives and never sent anywhere.

<home>/identity/
  <service>.nk     the key of a service on NATS; `cli` is that of commands on this machine
  node.key         the key of the node's certificate
  node.crt         the certificate, from the cluster's authority
  ca.crt           the authority's certificate: what this node trusts, since it joined

Without the two certificates the node belongs to no cluster yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from shoal_common.errors import BadInput, Denied, Refused
from shoal_common.host.file_kinds import read_text_file
from shoal_common.host.private_files import make_private_directory, replace_private
from shoal_common.identity import certificates
from shoal_common.identity.nkey import Nkey
from shoal_common.names import SERVICES
from shoal_common.redaction import remember_secret

CLI = "cli"
USERS = (*SERVICES, CLI)
"""The NATS users of a node."""


def inbox_prefix(node: str, user: str) -> str:
    """Return the prefix of the inboxes of a node's user: nobody else may subscribe below it."""
    return f"_INBOX.{node}.{user}"


class NodeIdentity:
    """The identity of one node. Files are read when they are needed. Blocking."""

    def __init__(self, home: Path, node: str) -> None:
        self.directory, self.node = home / "identity", node
        self.authority_file = self.directory / "ca.crt"
        self.certificate_file = self.directory / "node.crt"
        self.key_file = self.directory / "node.key"

    @property
    def is_member(self) -> bool:
        """Whether the node belongs to a cluster."""
        return self.certificate_file.exists() and self.authority_file.exists()

    def require_own(self) -> None:
        """Raise Refused if these are the keys of another node: the home is a copy that got another id."""
        try:
            certificates.public_key_of(self.certificate, self.authority, self.node)
        except Denied:
            raise Refused(
                f"{self.directory} has the keys of another node than {self.node}: put the id back into node.toml, or "
                "remove the directories identity and operator beside it for a node with keys of its own"
            ) from None

    def create(self) -> None:
        """Make the keys that are missing."""
        make_private_directory(self.directory)
        for user in USERS:
            if not self._nkey_file(user).exists():
                replace_private(self._nkey_file(user), f"{Nkey.create().text}\n".encode())
        if not self.key_file.exists():
            replace_private(self.key_file, certificates.key_to_pem(certificates.new_key()))

    def nkey(self, user: str) -> Nkey:
        """Return a user's key. Raises BadInput if it is missing or damaged."""
        path = self._nkey_file(user)
        text = self._read(path).strip()
        remember_secret(text)
        try:
            return Nkey.from_text(text)
        except BadInput as e:
            raise BadInput(f"{path}: {e.message}; put the file back from a copy, or join the cluster again") from None

    def public_nkeys(self) -> dict[str, str]:
        """Return the public keys of all users."""
        return {user: self.nkey(user).public for user in USERS}

    @cached_property
    def private_key(self) -> EllipticCurvePrivateKey:
        """The key of the certificate."""
        return certificates.key_from_pem(self._read(self.key_file).encode())

    @cached_property
    def authority(self) -> bytes:
        """The authority's certificate (PEM)."""
        return self._read(self.authority_file).encode()

    @cached_property
    def certificate(self) -> str:
        """This node's certificate (PEM)."""
        return self._read(self.certificate_file)

    def signing_request(self) -> str:
        """Return a request for the node's certificate."""
        return certificates.signing_request(self.private_key, self.node)

    def save(self, files: Mapping[str, str]) -> None:
        """Write certificates: `ca.crt`, `node.crt`. The last one makes the node a member."""
        for name in ("ca.crt", "node.crt"):
            if name in files:
                replace_private(self.directory / name, files[name].encode())
        self.__dict__.pop("authority", None)
        self.__dict__.pop("certificate", None)

    def remove(self) -> None:
        """Leave the cluster: remove every file, the certificate first."""
        for path in (self.certificate_file, self.authority_file, self.key_file, *map(self._nkey_file, USERS)):
            path.unlink(missing_ok=True)

    def _nkey_file(self, user: str) -> Path:
        return self.directory / f"{user}.nk"

    def _read(self, path: Path) -> str:
        try:
            return read_text_file(path)
        except FileNotFoundError:
            raise BadInput(
                f"{path} is missing: put it back from a copy, or leave the cluster with `shoal leave` and join again"
            ) from None


def load_identity(home: Path, node: str) -> NodeIdentity | None:
    """Return the identity of a node that belongs to a cluster."""
    identity = NodeIdentity(home, node)
    return identity if identity.is_member else None
