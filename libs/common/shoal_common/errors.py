"""The errors people meet, as one tree.

    ShoalError
    ├── BadInput            the request is not valid                       400  exit 2
    │   ├── BadName             a model, node, file or hash name
    │   ├── BadMessage          a payload that does not decode
    │   └── PromptTooLong       a prompt longer than the context
    ├── NotFound            it does not exist, here or on the hub          404  exit 3
    ├── Refused             valid, but not allowed now                     409  exit 4
    │   ├── InUse               it is in use
    │   ├── Cancelled           a person cancelled the work
    │   ├── Paused              a person paused the work
    │   ├── QuotaExceeded       not enough space within the quota          507
    │   ├── DiskFull            the disk took no more bytes                507
    │   ├── NoMemory            not enough memory                          507
    │   ├── AlreadyRunning      another process runs this node's service
    │   ├── OtherVersion        the cluster runs another major version
    │   └── Unsupported         this version cannot do it                  501
    ├── Busy                too many requests; try again in a moment       429  exit 5
    ├── Unavailable         something needed is down                       503  exit 5
    │   ├── HubUnavailable      the hub does not answer
    │   ├── NatsDown            NATS does not answer, or does not store
    │   ├── NodeDown            a node or its service is not live
    │   └── StageLost           an instance lost a stage
    ├── Denied              a credential is missing or refused             401  exit 6
    ├── Expired             a deadline passed                              504  exit 7
    ├── Corrupt             bytes do not match their hash                  502  exit 8
    └── InternalError       anything else                                  500  exit 1
        └── LoadError           a model's files do not load

Each class has a code: `ErrorBody.code` crosses processes, and `from_body` restores the class.
"""

from __future__ import annotations

import errno
from typing import Any, ClassVar

import msgspec

from shoal_common.redaction import redact

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""errno values of a full file system; they become `DiskFull`."""


class ErrorBody(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """An error on the wire."""

    code: str
    """Code of the error's class."""
    message: str
    """What happened, to what, and what to do next."""
    retryable: bool = False
    """Whether the same request may succeed later."""
    details: dict[str, Any] = {}
    """Figures of the error."""


class ShoalError(Exception):
    """Base of every error that a person sees. `details` holds figures: JSON types, units in the names.

    Secrets are masked in the message, which often ends with the text of a library.
    """

    code: ClassVar[str] = "failed"
    retryable: ClassVar[bool] = False
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, /, **details: Any) -> None:
        self.message = redact(message)
        super().__init__(self.message)
        self.details: dict[str, Any] = {
            name: redact(value) if isinstance(value, str) else value for name, value in details.items()
        }

    def body(self) -> ErrorBody:
        """Return this error as it crosses the wire."""
        return ErrorBody(code=self.code, message=self.message, retryable=self.retryable, details=self.details)


class InternalError(ShoalError):
    """Any error without a class of its own."""


class LoadError(InternalError):
    """A model's files do not load: damaged, or of a format that this version does not know."""

    code = "load_failed"


class BadInput(ShoalError):
    """The request is not valid."""

    code = "bad_input"
    http_status = 400
    exit_code = 2


class BadName(BadInput):
    """A name from outside that is not valid."""

    code = "bad_name"


class BadMessage(BadInput):
    """A payload that does not decode."""

    code = "bad_message"


class PromptTooLong(BadInput):
    """A prompt that is longer than the instance's context."""

    code = "prompt_too_long"


class NotFound(ShoalError):
    """It does not exist."""

    code = "not_found"
    http_status = 404
    exit_code = 3


class Refused(ShoalError):
    """The request is valid, but not allowed now."""

    code = "refused"
    http_status = 409
    exit_code = 4


class InUse(Refused):
    """It is in use; the message says by whom."""

    code = "in_use"


class Cancelled(Refused):
    """A person cancelled the work while it ran."""

    code = "cancelled"


class Paused(Refused):
    """A person paused the work while it ran. What has arrived is kept, and only a person resumes it."""

    code = "paused"


class AlreadyRunning(Refused):
    """Another live process already runs this node's service."""

    code = "already_running"
    exit_code = 9


class OtherVersion(Refused):
    """The cluster runs another major version; details hold the node and both versions."""

    code = "other_version"
    exit_code = 10


class QuotaExceeded(Refused):
    """Not enough space in the store; details hold the needed bytes, the free bytes and the quota."""

    code = "quota_exceeded"
    http_status = 507


class DiskFull(Refused):
    """The disk took no more bytes of an approved download: other programs filled it, or it has a quota of its own."""

    code = "disk_full"
    http_status = 507


class NoMemory(Refused):
    """No layout fits the nodes' memory; details hold every node's figures."""

    code = "no_room"
    http_status = 507


class Unsupported(Refused):
    """This version of Shoal cannot do it."""

    code = "unsupported"
    http_status = 501


class Busy(ShoalError):
    """Too many requests at this moment."""

    code = "busy"
    retryable = True
    http_status = 429
    exit_code = 5


class Unavailable(ShoalError):
    """Something needed is down."""

    code = "unavailable"
    retryable = True
    http_status = 503
    exit_code = 5


class HubUnavailable(Unavailable):
    """The hub does not answer, or answers with a server error."""

    code = "hub_unavailable"


class NatsDown(Unavailable):
    """NATS has not answered for long, or has not stored what was sent."""

    code = "nats_down"


class NodeDown(Unavailable):
    """A node, or the service needed on it, is not live."""

    code = "node_down"


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
    """Bytes do not match their hash."""

    code = "corrupt"
    retryable = True
    http_status = 502
    exit_code = 8


def _tree(cls: type[ShoalError]) -> list[type[ShoalError]]:
    return [cls, *(leaf for sub in cls.__subclasses__() for leaf in _tree(sub))]


# Without the root, which shares its code with InternalError.
BY_CODE: dict[str, type[ShoalError]] = {cls.code: cls for cls in _tree(ShoalError)[1:]}


def from_body(body: ErrorBody) -> ShoalError:
    """Return the error that a body describes; an unknown code, from a newer peer, becomes Failed with its message."""
    return BY_CODE.get(body.code, InternalError)(body.message, **body.details)


def error_body(error: BaseException) -> ErrorBody:
    """Return any exception as a body. A foreign exception is named; its trace is in the log."""
    if isinstance(error, ShoalError):
        return error.body()
    return InternalError(f"{type(error).__name__}: {error} (see the service's log)").body()
