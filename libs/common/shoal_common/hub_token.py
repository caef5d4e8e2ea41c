"""A person's token for the hub, handed to the fetcher of their own node (docs/transfer.md).

The fetcher listens on `<home>/run/fetcher.sock`, mode 0600, and answers no other user. One line of JSON each way: a
`GivenToken`, then a `TokenAnswer`. A token goes nowhere else: not to NATS, a file, an environment or a log.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from shoal_common.errors import BadInput, Denied, ErrorBody, Unavailable, from_body
from shoal_common.messages import DECODE_ERRORS
from shoal_common.names import ModelRef
from shoal_common.redaction import remember_secret

DEFAULT_ENDPOINT = "https://huggingface.co"
SOCKET_NAME = "fetcher.sock"
MAX_LINE_BYTES = 4096
MAX_LIFETIME_S = 24 * 3600.0
"""A token is kept until its model's downloads have ended, and never longer than this."""
ANSWER_TIMEOUT_S = 5.0
_MACOS_SOL_LOCAL, _MACOS_LOCAL_PEERCRED, _MACOS_XUCRED = 0, 1, "=Ii"
_LINUX_UCRED = "=iII"


class GivenToken(msgspec.Struct, frozen=True):
    """Use this token for what the hub has of this model."""

    model: str
    """`org/name`, with or without `@revision`."""
    token: str
    endpoint: str = DEFAULT_ENDPOINT
    """The hub that the token is for; a fetcher of another hub refuses it."""
    lifetime_s: float = MAX_LIFETIME_S
    """How long it may be kept."""

    def __repr__(self) -> str:
        return f"GivenToken({self.model!r})"

    def check(self) -> GivenToken:
        """Return it, with its token stripped. Raises BadInput, BadName."""
        ModelRef.parse(self.model)
        token = check_token(self.token, "the token")
        if not token:
            raise BadInput("the token is empty")
        return msgspec.structs.replace(self, token=token)


class TokenAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """Whether the fetcher has taken the token."""

    error: ErrorBody | None = None


def read_endpoint(environ: Mapping[str, str]) -> str:
    """Return the hub that an environment names: HF_ENDPOINT, or Hugging Face."""
    return (environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def check_token(token: str, name: str = "HF_TOKEN") -> str:
    """Return a token without the spaces around it. Raises BadInput, which does not quote it, if it is none."""
    token = token.strip()
    if not all(c.isascii() and c.isprintable() and not c.isspace() for c in token):
        raise BadInput(f"{name} holds a space, a line break or another character that no token has: set it again")
    return token


def peer_uid(connection: socket.socket) -> int:
    """Return the user at the other end of a Unix socket, by the kernel's word."""
    if sys.platform == "linux":
        size = struct.calcsize(_LINUX_UCRED)
        _, uid, _ = struct.unpack(_LINUX_UCRED, connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    else:
        credentials = connection.getsockopt(_MACOS_SOL_LOCAL, _MACOS_LOCAL_PEERCRED, 128)
        _, uid = struct.unpack_from(_MACOS_XUCRED, credentials)
    return int(uid)


def check_same_user(connection: socket.socket) -> None:
    """Raise Denied if another user is at the other end."""
    if peer_uid(connection) != os.geteuid():
        raise Denied("this socket serves only the user who runs the node: pull as that user")


def give_token(run: Path, given: GivenToken) -> None:
    """Hand a token to the fetcher that works in `run`. Blocking. Raises Denied, Unavailable, BadInput."""
    remember_secret(given.token)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
        s.settimeout(ANSWER_TIMEOUT_S)
        try:
            with _working_in(run):  # a socket's path may have some 100 bytes
                s.connect(SOCKET_NAME)
            check_same_user(s)
            with suppress(BrokenPipeError):  # it has refused us already, and says so
                s.sendall(msgspec.json.encode(given) + b"\n")
            with s.makefile("rb") as lines:
                answer = msgspec.json.decode(lines.readline(MAX_LINE_BYTES), type=TokenAnswer)
        except (OSError, *DECODE_ERRORS) as e:
            raise Unavailable(f"the fetcher of {run.parent} takes no token ({type(e).__name__})") from None
    if answer.error is not None:
        raise from_body(answer.error)


@contextmanager
def _working_in(directory: Path) -> Iterator[None]:
    before = os.open(".", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.chdir(directory)
        yield
    finally:
        os.fchdir(before)
        os.close(before)
