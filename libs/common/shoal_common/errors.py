"""The errors people meet, as one tree.

    ShoalError
    ├── BadInput            what was asked cannot be understood            400  exit 2
    │   ├── BadName             a model, node, file or hash name
    │   ├── BadMessage          a payload that does not decode
    │   └── PromptTooLong       a prompt past the context
    ├── NotFound            it does not exist, here or on the hub          404  exit 3
    ├── Refused             understood, and not done                       409  exit 4
    │   ├── InUse               somebody is using it
    │   ├── Withdrawn           the work was taken back by a person
    │   ├── Paused              the work was stopped by a person, to go on later
    │   ├── QuotaExceeded       no room on the disk                        507
    │   ├── DiskFull            the disk took no more bytes                507
    │   ├── NoRoom              no room in memory                          507
    │   ├── Claimed             another process is this node's service
    │   ├── OtherVersion        the cluster runs another major version
    │   └── Unsupported         this version cannot do it                  501
    ├── Busy                try again in a moment                          429  exit 5
    ├── Unavailable         somebody needed is away                        503  exit 5
    │   ├── HubUnavailable      the hub does not answer
    │   ├── NodeAway            a node or its service is not live
    │   └── StageLost           an instance lost a stage
    ├── Denied              a credential is missing or refused             401  exit 6
    ├── Expired             a deadline passed                              504  exit 7
    ├── Corrupt             bytes do not match their hash                  502  exit 8
    └── Failed              anything else, said plainly                    500  exit 1

A class is its code: `ErrorBody.code` crosses processes, and `from_body` gives the class back.
"""

from __future__ import annotations

import errno
from typing import Any, ClassVar

import msgspec

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a file system says that takes no more: `DiskFull` in the end."""


class ErrorBody(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """An error on the wire. `message` says what happened, to what, and what to do next."""

    code: str
    message: str
    retryable: bool = False
    details: dict[str, Any] = {}


class ShoalError(Exception):
    """Base of every error that reaches a person. `details` holds figures, JSON-able, units in names."""

    code: ClassVar[str] = "failed"
    retryable: ClassVar[bool] = False
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def body(self) -> ErrorBody:
        """This error as it crosses the wire."""
        return ErrorBody(code=self.code, message=self.message, retryable=self.retryable, details=self.details)


class Failed(ShoalError):
    """Anything without a better name."""


class BadInput(ShoalError):
    """What was asked cannot be understood."""

    code = "bad_input"
    http_status = 400
    exit_code = 2


class BadName(BadInput):
    """A name from outside that is not one of ours."""

    code = "bad_name"


class BadMessage(BadInput):
    """A payload that does not decode."""

    code = "bad_message"


class PromptTooLong(BadInput):
    """A prompt that does not fit the instance's context."""

    code = "prompt_too_long"


class NotFound(ShoalError):
    """It does not exist."""

    code = "not_found"
    http_status = 404
    exit_code = 3


class Refused(ShoalError):
    """Understood, and not done."""

    code = "refused"
    http_status = 409
    exit_code = 4


class InUse(Refused):
    """Somebody is using it; the message says who."""

    code = "in_use"


class Withdrawn(Refused):
    """A person took the work back while it ran."""

    code = "withdrawn"


class Paused(Refused):
    """A person stopped the work while it ran; what has arrived is kept, and only a person lets it go on."""

    code = "paused"


class Claimed(Refused):
    """Another live process is this node's service already."""

    code = "claimed"
    exit_code = 9


class OtherVersion(Refused):
    """The cluster runs another major version: node and both versions are in the details."""

    code = "other_version"
    exit_code = 10


class QuotaExceeded(Refused):
    """The disk has no room for it: needed, free and quota are in the details."""

    code = "quota_exceeded"
    http_status = 507


class DiskFull(Refused):
    """The disk took no more of what had been approved: others have filled it, or a quota of its own is used up."""

    code = "disk_full"
    http_status = 507


class NoRoom(Refused):
    """No layout fits the nodes' memory: every node's figures are in the details."""

    code = "no_room"
    http_status = 507


class Unsupported(Refused):
    """This version of Shoal cannot do it."""

    code = "unsupported"
    http_status = 501


class Busy(ShoalError):
    """Full for the moment."""

    code = "busy"
    retryable = True
    http_status = 429
    exit_code = 5


class Unavailable(ShoalError):
    """Somebody needed is away."""

    code = "unavailable"
    retryable = True
    http_status = 503
    exit_code = 5


class HubUnavailable(Unavailable):
    """The hub does not answer, or answers with a fault of its own."""

    code = "hub_unavailable"


class NodeAway(Unavailable):
    """A node, or the service of it that is needed, is not live."""

    code = "node_away"


class StageLost(Unavailable):
    """An instance lost a stage while it was needed."""

    code = "stage_lost"


class Denied(ShoalError):
    """A credential is missing or was refused."""

    code = "denied"
    http_status = 401
    exit_code = 6


class Expired(ShoalError):
    """A deadline passed."""

    code = "expired"
    retryable = True
    http_status = 504
    exit_code = 7


class Corrupt(ShoalError):
    """Bytes do not match the hash they were promised under."""

    code = "corrupt"
    retryable = True
    http_status = 502
    exit_code = 8


def _tree(cls: type[ShoalError]) -> list[type[ShoalError]]:
    return [cls, *(leaf for sub in cls.__subclasses__() for leaf in _tree(sub))]


# Without the root: it shares its code with Failed, which is what that code means.
BY_CODE: dict[str, type[ShoalError]] = {cls.code: cls for cls in _tree(ShoalError)[1:]}


def from_body(body: ErrorBody) -> ShoalError:
    """The error a body came from; an unknown code (a newer peer) becomes Failed with the same words."""
    return BY_CODE.get(body.code, Failed)(body.message, **body.details)


def as_body(error: BaseException) -> ErrorBody:
    """Any exception as a body. Ours keep their words; a stranger's is named, for the log has the rest."""
    if isinstance(error, ShoalError):
        return error.body()
    return ErrorBody(code=Failed.code, message=f"{type(error).__name__}: {error} (see the service's log)")
