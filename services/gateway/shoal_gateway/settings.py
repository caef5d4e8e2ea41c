"""The gateway's settings: its port from the environment, its time-outs from `[gateway]` in node.toml.

SHOAL_GATEWAY_PORT   port to listen on; 0 takes any free one   8080
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import msgspec

from shoal_common.config import Config, is_loopback
from shoal_common.errors import BadInput

DEFAULT_PORT = 8080

Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]


class GatewayTimeouts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long the gateway waits, in seconds: `[gateway]` in node.toml."""

    accept_s: Seconds = 30.0
    """For an instance to accept a prompt."""
    first_token_s: Seconds = 300.0
    """For the first token: a long prompt is processed first, without output."""
    silence_s: Seconds = 60.0
    """Between two tokens; also for a client that reads nothing."""
    keep_alive_s: Seconds = 15.0
    """Between two keep-alives to a client that follows events."""
    gap_s: Seconds = 2.0
    """For a token after which a later one has arrived already."""
    fetch_begins_s: Seconds = 15.0
    """For a download to leave its queue before the request is answered."""
    outcome_s: Seconds = 60.0
    """For short commands: cancel, delete, stop, and all to storage but verify."""
    verify_s: Seconds = 3600.0
    """For the verification of everything that a node holds."""
    download_s: Seconds = 86400.0
    """For a download that the client waits for."""
    place_s: Seconds = 600.0
    """For an instance to become ready."""


class GatewaySettings(msgspec.Struct, frozen=True, kw_only=True):
    """The gateway's own settings."""

    port: int
    timeouts: GatewayTimeouts
    credential_needed: bool
    """Whether requests need the cluster's secret: always beyond loopback (I12)."""


def read_settings(config: Config, environ: Mapping[str, str]) -> GatewaySettings:
    """Return the settings. Raises BadInput naming the wrong one."""
    text = environ.get("SHOAL_GATEWAY_PORT") or str(DEFAULT_PORT)
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise BadInput(f"SHOAL_GATEWAY_PORT is {text[:40]!r}; give a port from 0 to 65535")
    try:
        timeouts = msgspec.convert(config.settings.get("gateway", {}), GatewayTimeouts)
    except msgspec.ValidationError as e:
        raise BadInput(f"[gateway] in {config.home / 'node.toml'}: {e}") from None
    return GatewaySettings(port=int(text), timeouts=timeouts, credential_needed=not is_loopback(config.bind))
