"""How often a wrong key may be typed, by address. Pure: time arrives as `now_s`."""

from __future__ import annotations

from contextlib import suppress
from ipaddress import IPv6Address, IPv6Network, ip_address

MAX_FAILURES = 10
"""Of an address within WINDOW_S; the next attempt waits until the window ends."""
WINDOW_S = 60.0
MAX_ADDRESSES = 1024
"""Counted at a time; the oldest is forgotten."""
_NETWORK_BITS = 64
"""Whoever has an IPv6 address has all addresses of its network."""


class LoginAttempts:
    """The failures of the last minute."""

    def __init__(self) -> None:
        self._failures: dict[str, tuple[float, int]] = {}
        """When the first one was, and how many, by address; the oldest first."""
        self._reported_s = float("-inf")

    def wait_s(self, address: str, now_s: float) -> float:
        """Return for how long no attempt of this address is considered."""
        since_s, count = self._failures.get(_source(address), (now_s, 0))
        return max(since_s + WINDOW_S - now_s, 0.0) if count >= MAX_FAILURES else 0.0

    def record_failure(self, address: str, now_s: float) -> bool:
        """Count a failure. Returns whether to log it: when an address reaches its limit, at most once a window."""
        source = _source(address)
        since_s, count = self._failures.get(source, (now_s, 0))
        if now_s - since_s >= WINDOW_S:
            since_s, count = now_s, 0
            self._failures.pop(source)
        if source not in self._failures and len(self._failures) >= MAX_ADDRESSES:
            self._failures.pop(next(iter(self._failures)))
        self._failures[source] = (since_s, count + 1)
        if count + 1 < MAX_FAILURES or now_s - self._reported_s < WINDOW_S:
            return False
        self._reported_s = now_s
        return True


def _source(address: str) -> str:
    with suppress(ValueError):
        ip = ip_address(address)
        if isinstance(ip, IPv6Address) and ip.ipv4_mapped is None:
            return str(IPv6Network((int(ip), _NETWORK_BITS), strict=False))
    return address
