"""What ends a stage or one of its connections, as one tree. What ends a request is a ShoalError, as everywhere.

StageError
├── FatalError              ends the child: `Fatal`, exit status 1
│   ├── UnsupportedArchitecture
│   ├── LoadFailed          files missing, or a context that nobody states
│   │   └── UnreadableModel     files that do not load: damaged, or of a format that is not known
│   ├── UnusableTokenizer   the tokenizer aborts, loops, or takes too much memory
│   ├── ComputeStuck        one forward pass outlived its deadline: its thread cannot be stopped
│   └── BadControl          the parent said something that does not decode, or in the wrong order
└── LinkError               ends one connection; requests that needed it end with StageLost
    ├── BadFrame            bytes that are not a frame of this version, or beyond its limits
    ├── HandshakeRefused    the handshake did not prove membership of this ring
    └── LinkClosed          end of stream, a reset, or a deadline
"""

from __future__ import annotations

from typing import ClassVar

from shoal_common.errors import ErrorBody, InternalError, LoadError, ShoalError, StageLost, Unsupported

_MAX_REASON_CHARS = 400
"""mlx-lm lists every tensor that it misses."""


class StageError(Exception):
    """Base: `message` says what happened, to what, and what to do next."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class FatalError(StageError):
    """Ends the child."""

    meaning: ClassVar[type[ShoalError]] = InternalError
    """The error that people see in the stage's state."""

    def body(self) -> ErrorBody:
        """Return it as it crosses to the parent."""
        return self.meaning(self.message).body()


class UnsupportedArchitecture(FatalError):
    """The model is not of a kind that can be cut into stages here."""

    meaning = Unsupported


class LoadFailed(FatalError):
    """The model's files are missing, damaged or incomplete."""


class UnreadableModel(LoadFailed):
    """The model's files do not load: the next attempt ends in the same way unless somebody repairs them."""

    meaning = LoadError

    @classmethod
    def because(cls, what: str, error: Exception) -> UnreadableModel:
        """Return it on one line: what does not load, and the library's words."""
        return cls(f"cannot load {what}: {type(error).__name__}: {' '.join(str(error).split())[:_MAX_REASON_CHARS]}")


class UnusableTokenizer(FatalError):
    """The tokenizer aborts, loops, or takes too much memory."""

    meaning = Unsupported


class ComputeStuck(FatalError):
    """A forward pass outlived its deadline."""

    meaning = StageLost


class BadControl(FatalError):
    """The parent said something that does not decode, or in the wrong order."""


class LinkError(StageError):
    """Ends one connection."""


class BadFrame(LinkError):
    """Bytes that are not a frame of this version, or beyond its limits."""


class HandshakeRefused(LinkError):
    """The handshake did not prove membership of this ring."""


class LinkClosed(LinkError):
    """End of stream, a reset, or a deadline."""
