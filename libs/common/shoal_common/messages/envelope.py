"""What every command and reply is wrapped in."""

from __future__ import annotations

from typing import Any

import msgspec

from shoal_common.errors import ErrorBody
from shoal_common.messages import WireStruct


class RpcReply(WireStruct):
    """The envelope of every RPC reply."""

    result: msgspec.Raw = msgspec.Raw(b"{}")
    """The reply itself, if the request succeeded."""
    error: ErrorBody | None = None
    """Why it failed, if it failed."""


class Empty(WireStruct):
    """A request or reply without content."""


class Command(WireStruct):
    """Fields that every command has."""

    id: str = ""
    """The command's id, unless the `Nats-Msg-Id` header holds one."""
    deadline_s: float = 0.0
    """Seconds from sending until the command ends with `expired`; 0 means the verb's default."""
    expires_at_s: float = 0.0
    """When the sender gives up (set by gateways): a service that receives it later does not run it; 0: never."""


class Outcome(WireStruct):
    """How a command ended; also the reply to `nats req`.

    `done` key `<command id>`, published by the command's service or, while that is down, by the sender that
    cancels it. The first one stands.
    """

    id: str
    """The command's id."""
    ok: bool
    """Whether the command succeeded."""
    node: str = ""
    """The node that ran the command."""
    service: str = ""
    """The service that ran the command."""
    verb: str = ""
    """The command's verb."""
    result: dict[str, Any] = {}
    """The command's result, if it succeeded."""
    error: ErrorBody | None = None
    """Why it failed, if it failed."""
    ended_at_s: float = 0.0
    """When the command ended."""
