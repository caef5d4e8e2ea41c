"""The names and addresses of this machine, which its certificate states for clients that go by them."""

from __future__ import annotations

import socket
from collections.abc import Mapping

from shoal_cli.membership.admission import MAX_HOSTS, certificate_hosts
from shoal_common.errors import BadInput
from shoal_common.host.interfaces import read_interfaces


def machine_hosts(environ: Mapping[str, str]) -> list[str]:
    """Return them: those of SHOAL_ADVERTISE first, then the host's name, then its interfaces'. Blocks."""
    advertised = [a.strip() for a in environ.get("SHOAL_ADVERTISE", "").split(",") if a.strip()]
    interfaces = [a.partition("/")[0] for i in read_interfaces() for a in i.addresses]
    hosts = [*advertised, socket.gethostname(), "localhost", "127.0.0.1", "::1", *interfaces]
    return list(dict.fromkeys(h for h in hosts if _may_be_stated(h)))[:MAX_HOSTS]


def _may_be_stated(host: str) -> bool:
    try:
        certificate_hosts([host])
    except BadInput:
        return False
    return True
