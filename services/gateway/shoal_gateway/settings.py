"""The gateway's settings: its port, and `[gateway]` in node.toml: TLS and time-outs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from shoal_common.config import Config
from shoal_common.http.scheme import gateway_scheme
from shoal_common.settings.declaration import Timeout, setting
from shoal_common.settings.node import PortSettings, TlsSettings
from shoal_common.settings.values import read_settings


def _of(what: str) -> Meta:
    return setting(f"time {what}", has_variable=False)


class GatewayTimeouts(TlsSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of `[gateway]`: TLS, and how long the gateway waits."""

    section: ClassVar[str] = "gateway"

    accept_s: Annotated[Timeout, _of("for an instance to accept a prompt")] = 30.0
    first_token_s: Annotated[
        Timeout, _of("for the first token: a long prompt is processed first, without output")
    ] = 300.0
    silence_s: Annotated[Timeout, _of("between two tokens; also for a client that reads nothing")] = 60.0
    keep_alive_s: Annotated[Timeout, _of("between two keep-alives to a client that follows events")] = 15.0
    gap_s: Annotated[Timeout, _of("for a token after which a later one has arrived already")] = 2.0
    fetch_begins_s: Annotated[Timeout, _of("for a download to leave its queue before the request is answered")] = 15.0
    outcome_s: Annotated[Timeout, _of("for short commands: cancel, delete, stop, and all to storage but verify")] = (
        60.0
    )
    verify_s: Annotated[Timeout, _of("for the verification of everything that a node holds")] = 3600.0
    download_s: Annotated[Timeout, _of("for a download that the client waits for")] = 86400.0
    place_s: Annotated[Timeout, _of("for an instance to become ready")] = 600.0


class GatewaySettings(msgspec.Struct, frozen=True, kw_only=True):
    """The gateway's own settings."""

    port: int
    timeouts: GatewayTimeouts
    speaks_tls: bool


def read_gateway_settings(config: Config, environ: Mapping[str, str]) -> GatewaySettings:
    """Return the settings. Raises BadInput naming the wrong one."""
    timeouts = read_settings(GatewayTimeouts, config.settings, environ)
    return GatewaySettings(
        port=read_settings(PortSettings, config.settings, environ).gateway_port,
        timeouts=timeouts,
        speaks_tls=gateway_scheme(config.bind, config.identity is not None, timeouts.tls) == "https",
    )
