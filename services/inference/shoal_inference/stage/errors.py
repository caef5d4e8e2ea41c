"""What can go wrong in a stage, as one tree. `code` crosses to the parent in `Failed` and `Fatal`.

StageError
├── RequestError            ends one request: `Failed`
│   ├── BadInput            the request cannot be understood
│   ├── PromptTooLong       the prompt alone fills the context
│   ├── Busy                as many requests in flight as this stage allows
│   ├── StageLost           a link of the ring broke while the request needed it
│   ├── StageTimeout        nothing came back around the ring for too long
│   └── ComputeFailed       MLX, or a frame that makes no sense in this request
├── FatalError              ends the child: `Fatal`, exit status 1
│   ├── UnsupportedArchitecture
│   ├── LoadFailed          files missing or damaged, or a context that nobody states
│   ├── ComputeStuck        one forward pass outlived its deadline: its thread cannot be stopped
│   └── BadControl          the parent said something that does not decode, or in the wrong order
└── LinkError               ends one connection; requests that needed it end with StageLost
    ├── BadFrame            bytes that are not a frame of this version, or beyond its limits
    ├── Refused             the handshake did not prove membership of this ring
    └── LinkClosed          end of stream, a reset, or a deadline
"""

from __future__ import annotations

from typing import ClassVar


class StageError(Exception):
    """Base: `message` says what happened, to what, and what to do next."""

    code: ClassVar[str] = "failed"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class RequestError(StageError):
    """Ends one request."""


class InvalidRequest(RequestError):
    """The request cannot be understood."""

    code = "bad_input"


class ContextExceeded(RequestError):
    """The prompt alone fills the context."""

    code = "prompt_too_long"


class StageBusy(RequestError):
    """As many requests in flight as this stage allows."""

    code = "busy"


class RingBroken(RequestError):
    """A link of the ring broke while the request needed it."""

    code = "stage_lost"


class StageTimeout(RequestError):
    """Nothing came back around the ring for too long."""

    code = "stage_timeout"


class ComputeFailed(RequestError):
    """A forward pass failed, or a frame makes no sense in its request."""

    code = "compute_failed"


class FatalError(StageError):
    """Ends the child."""


class UnsupportedArchitecture(FatalError):
    """The model is not of a kind that can be cut into stages here."""

    code = "unsupported_architecture"


class LoadFailed(FatalError):
    """The model's files are missing, damaged or incomplete."""

    code = "load_failed"


class ComputeStuck(FatalError):
    """A forward pass outlived its deadline."""

    code = "compute_stuck"


class BadControl(FatalError):
    """The parent said something that does not decode, or in the wrong order."""

    code = "bad_control"


class LinkError(StageError):
    """Ends one connection."""

    code = "link_failed"


class BadFrame(LinkError):
    """Bytes that are not a frame of this version, or beyond its limits."""

    code = "bad_frame"


class HandshakeRefused(LinkError):
    """The handshake did not prove membership of this ring."""

    code = "refused"


class LinkClosed(LinkError):
    """End of stream, a reset, or a deadline."""

    code = "link_closed"
