"""Which of a node's addresses is fastest, as measured. Pure: time arrives as `now_s`.

The order of `Surroundings.addresses` is by what interfaces are said to be; this puts what was measured above it. An
address goes before those ahead of it when it is clearly faster (FASTER times), so that noise does not move traffic,
and behind all others for a while when it could not be reached. What has not been measured is tried with one small
request, so that a fast address behind a slow one is found.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import msgspec

FASTER = 2.0
"""So many times as fast is clearly faster."""
WEIGHT = 0.25
"""Of the newest measurement in the moving average."""
MIN_BYTES = 1 << 20
"""Less than this measures latency, not a rate."""
TRIAL_BYTES = 4 << 20
"""A request of so much at the most may go to an address of which nothing is known."""
FAILED_FOR_S = 60.0
"""How long an address that could not be reached is tried last."""
MEASURED_FOR_S = 600.0
"""After so long a measurement says nothing any more."""
MAX_KEPT = 1024


class _Known(msgspec.Struct):
    bytes_per_s: float = 0.0
    measured_at_s: float = 0.0
    failed_until_s: float = 0.0


class Rates:
    """Moving averages of rates by node and address; of at most MAX_KEPT, the longest unused forgotten first."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str], _Known] = OrderedDict()

    def measured(self, node: str, address: str, size_bytes: int, took_s: float, now_s: float) -> None:
        """So many bytes have come from this address in this time."""
        known = self._touch(node, address)
        known.failed_until_s = 0.0
        if size_bytes < MIN_BYTES or took_s <= 0:
            return
        rate = size_bytes / took_s
        fresh = known.bytes_per_s and now_s - known.measured_at_s < MEASURED_FOR_S
        known.bytes_per_s = WEIGHT * rate + (1 - WEIGHT) * known.bytes_per_s if fresh else rate
        known.measured_at_s = now_s

    def failed(self, node: str, address: str, now_s: float) -> None:
        """This address could not be reached, or broke off."""
        self._touch(node, address).failed_until_s = now_s + FAILED_FOR_S

    def bytes_per_s(self, node: str, address: str, now_s: float) -> float:
        """The moving average, 0 where there is none that still says something."""
        known = self._known.get((node, address))
        return known.bytes_per_s if known and now_s - known.measured_at_s < MEASURED_FOR_S else 0.0

    def order(self, node: str, addresses: Sequence[str], now_s: float, size_bytes: int = 0) -> list[str]:
        """A node's addresses in the order to try; `size_bytes` of the request, where a small one may be a trial."""
        failed = [a for a in addresses if self._failed(node, a, now_s)]
        found = [a for a in addresses if a not in failed]
        rates = {a: self.bytes_per_s(node, a, now_s) for a in found}
        best = max(found, key=lambda a: rates[a], default="")
        first = next((a for a in found if rates[a]), "")
        if first and rates[best] >= FASTER * rates[first]:
            found.sort(key=lambda a: a != best)
        if MIN_BYTES <= size_bytes <= TRIAL_BYTES and first:
            # One that nobody has measured, once something has been: else the first is the trial itself.
            unknown = [a for a in found if not rates[a]][:1]
            found.sort(key=lambda a: a not in unknown)
        return found + failed

    def _failed(self, node: str, address: str, now_s: float) -> bool:
        known = self._known.get((node, address))
        return known is not None and now_s < known.failed_until_s

    def _touch(self, node: str, address: str) -> _Known:
        known = self._known.setdefault((node, address), _Known())
        self._known.move_to_end((node, address))
        if len(self._known) > MAX_KEPT:
            self._known.popitem(last=False)
        return known
