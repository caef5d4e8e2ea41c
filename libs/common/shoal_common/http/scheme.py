"""Whether a node's gateway speaks TLS. Pure."""

from __future__ import annotations

from typing import Literal

from shoal_common.config import is_loopback
from shoal_common.settings.node import TlsMode


def gateway_scheme(bind: str, is_member: bool, tls: TlsMode) -> Literal["http", "https"]:
    """Return the scheme of the gateway's URL. `is_member`: the node has an identity, and so a certificate."""
    return "https" if is_member and tls == "auto" and not is_loopback(bind) else "http"
