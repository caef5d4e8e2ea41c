"""Which requests name this server: one plain Host, a path as the target. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from shoal_common.config import is_loopback
from shoal_common.errors import BadInput, ShoalError
from shoal_common.http.errors import CrossOriginForbidden

_HOST = re.compile(r"(?:\[(?P<ip>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::[0-9]{0,5})?", re.ASCII)
_SHOWN_CHARS = 100
_CACHED_HOSTS = 64


def host_error(target: bytes, headers: Iterable[tuple[bytes, bytes]], loopback_only: bool) -> ShoalError | None:
    """Return why a request is refused, or None. Names of headers are in lower case.

    Two hosts, or one in the target, may mean one to a proxy and another here. On loopback a page whose own host name
    resolves to 127.0.0.1 (DNS rebinding) is same-origin with this server: it answers to loopback's names only.
    """
    if not target.startswith(b"/") and target != b"*":
        return BadInput("a request's target is a path: this server is no proxy")
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) != 1:
        return BadInput(f"a request has one Host header, not {len(hosts)}")
    hostname = _hostname(hosts[0])
    shown = hosts[0][:_SHOWN_CHARS].decode("latin-1")
    if not hostname:
        return BadInput(f"Host is a name or an address, with a port where it has one, not {shown!r}")
    if loopback_only and not _is_loopback_name(hostname):
        return CrossOriginForbidden(f"this address answers only as 127.0.0.1 or localhost, not as {shown!r}")
    return None


def names_loopback(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Return whether a request was sent to this machine's own name: no page of another name sends that."""
    hosts = [value for name, value in headers if name == b"host"]
    return len(hosts) == 1 and _is_loopback_name(_hostname(hosts[0]))


@lru_cache(_CACHED_HOSTS)
def _hostname(host: bytes) -> str:
    found = _HOST.fullmatch(host.decode("latin-1"))
    return (found["ip"] or found["name"]).lower() if found else ""


@lru_cache(_CACHED_HOSTS)
def _is_loopback_name(hostname: str) -> bool:
    try:
        return is_loopback(hostname)
    except BadInput:
        return False
