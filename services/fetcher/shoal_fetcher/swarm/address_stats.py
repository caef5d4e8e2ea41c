"""Which of a node's addresses is fastest, as measured. Pure: time arrives as `now_s`.

`ClusterView.addresses` orders by the published kind of the interfaces; measurements override that. An address moves
ahead of others when it is clearly faster (FASTER_FACTOR times), so that noise does not move traffic, and behind all
others for a while when it was unreachable. An unmeasured address is tried with one small request, so that a fast
address behind a slow one is found.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import msgspec

FASTER_FACTOR = 2.0
"""An address this many times as fast is clearly faster."""
NEWEST_WEIGHT = 0.25
"""Weight of the newest measurement in the moving average."""
MIN_BYTES = 1 << 20
"""A smaller transfer measures latency, not a rate."""
MAX_TRIAL_BYTES = 4 << 20
"""Largest request that may try an address without a measurement."""
FAILED_BACKOFF_S = 60.0
"""How long an unreachable address is tried last."""
MEASUREMENT_TTL_S = 600.0
"""How long a measurement is valid."""
MAX_ADDRESSES = 1024


class _Known(msgspec.Struct):
    bytes_per_s: float = 0.0
    measured_at_s: float = 0.0
    failed_until_s: float = 0.0


class AddressStats:
    """Moving averages of rates by node and address: an LRU of at most MAX_ADDRESSES."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str], _Known] = OrderedDict()

    def record(self, node: str, address: str, size_bytes: int, took_s: float, now_s: float) -> None:
        """Record a transfer from an address."""
        known = self._touch(node, address)
        known.failed_until_s = 0.0
        if size_bytes < MIN_BYTES or took_s <= 0:
            return
        rate = size_bytes / took_s
        fresh = known.bytes_per_s and now_s - known.measured_at_s < MEASUREMENT_TTL_S
        known.bytes_per_s = NEWEST_WEIGHT * rate + (1 - NEWEST_WEIGHT) * known.bytes_per_s if fresh else rate
        known.measured_at_s = now_s

    def record_failure(self, node: str, address: str, now_s: float) -> None:
        """Record that an address was unreachable, or broke off."""
        self._touch(node, address).failed_until_s = now_s + FAILED_BACKOFF_S

    def bytes_per_s(self, node: str, address: str, now_s: float) -> float:
        """Return the moving average, 0 without a valid measurement."""
        known = self._known.get((node, address))
        return known.bytes_per_s if known and now_s - known.measured_at_s < MEASUREMENT_TTL_S else 0.0

    def sort_by_rate(self, node: str, addresses: Sequence[str], now_s: float, size_bytes: int = 0) -> list[str]:
        """Return the addresses in the order to try; a request of small `size_bytes` may try an unmeasured one."""
        failed = [a for a in addresses if self._failed(node, a, now_s)]
        working = [a for a in addresses if a not in failed]
        rates = {a: self.bytes_per_s(node, a, now_s) for a in working}
        best = max(working, key=lambda a: rates[a], default="")
        first = next((a for a in working if rates[a]), "")
        if first and rates[best] >= FASTER_FACTOR * rates[first]:
            working.sort(key=lambda a: a != best)
        if MIN_BYTES <= size_bytes <= MAX_TRIAL_BYTES and first:
            # Try an unmeasured one only once another is measured: else the first is the trial itself.
            unmeasured = [a for a in working if not rates[a]][:1]
            working.sort(key=lambda a: a not in unmeasured)
        return working + failed

    def _failed(self, node: str, address: str, now_s: float) -> bool:
        known = self._known.get((node, address))
        return known is not None and now_s < known.failed_until_s

    def _touch(self, node: str, address: str) -> _Known:
        known = self._known.setdefault((node, address), _Known())
        self._known.move_to_end((node, address))
        if len(self._known) > MAX_ADDRESSES:
            self._known.popitem(last=False)
        return known
