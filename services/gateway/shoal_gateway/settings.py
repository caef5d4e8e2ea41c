"""What the gateway is told from outside: its port by the environment, its limits by `[gateway]` in node.toml.

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


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long the gateway waits. All in seconds, all of `[gateway]` in node.toml."""

    accept_s: Seconds = 30.0
    """For an instance to accept a prompt."""
    first_token_s: Seconds = 300.0
    """For the first token: a long prompt is read first, and that is silent."""
    silence_s: Seconds = 60.0
    """Between two tokens; also for a client that does not read."""
    keep_alive_s: Seconds = 15.0
    """Between two signs of life to a client that follows events."""
    gap_s: Seconds = 2.0
    """For a token that was overtaken by a later one."""
    fetch_begins_s: Seconds = 15.0
    """For a download to get past its queue before the answer says how it stands."""
    outcome_s: Seconds = 60.0
    """For commands that end soon: cancel, delete, stop, and those to storage but one."""
    verify_s: Seconds = 3600.0
    """For a verification of all that a node holds."""
    download_s: Seconds = 86400.0
    """For a download whose asker waits for its end."""
    place_s: Seconds = 600.0
    """For an instance to become ready."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The gateway's own settings."""

    port: int
    limits: Limits
    credential_needed: bool
    """Whether requests must show the cluster's secret: beyond loopback, always (I12)."""


def read_settings(config: Config, environ: Mapping[str, str]) -> Settings:
    """Read them once. Raises BadInput naming the setting that is wrong."""
    text = environ.get("SHOAL_GATEWAY_PORT") or str(DEFAULT_PORT)
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise BadInput(f"SHOAL_GATEWAY_PORT is {text[:40]!r}: give a port, 0 to 65535")
    try:
        limits = msgspec.convert(config.settings.get("gateway", {}), Limits)
    except msgspec.ValidationError as e:
        raise BadInput(f"[gateway] in {config.home / 'node.toml'}: {e}") from None
    return Settings(port=int(text), limits=limits, credential_needed=not is_loopback(config.bind))
