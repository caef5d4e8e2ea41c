"""The hub's listing of a commit, to hold a node's manifest against: one request of names and hashes, no weights."""

from __future__ import annotations

import asyncio
import time

from shoal_common.errors import Denied, HubUnavailable, NotFound, ShoalError
from shoal_common.messages.manifest import Manifest
from shoal_common.names import ModelRef
from shoal_fetcher.hub.client import HubClient

DEADLINE_S = 10.0
"""A download from nodes waits this long for the hub to list its files."""
RETRY_AFTER_S = 60.0
"""A hub that has not listed a model is not waited for again before."""
_MAX_FAILURES = 1024


class HubListings:
    """Asks the hub, and remembers for a minute of which models it had no answer.

    By model: one whose listing never ends, or is invalid, says nothing about the others.
    """

    def __init__(self, hub: HubClient) -> None:
        self._hub = hub
        self._failures: dict[str, tuple[float, str]] = {}

    async def listing(self, ref: ModelRef) -> Manifest:
        """Return what the hub lists. Raises NotFound or Denied if it does not show it, else HubUnavailable."""
        until_s, reason = self._failures.get(ref.repo, (0.0, ""))
        if time.monotonic() < until_s:
            raise HubUnavailable(reason)
        try:
            async with asyncio.timeout(DEADLINE_S):
                return await self._hub.resolve(ref)
        except (NotFound, Denied):
            raise
        except (ShoalError, TimeoutError) as e:
            reason = e.message if isinstance(e, ShoalError) else f"the hub has not listed {ref} in {DEADLINE_S:.0f} s"
            if len(self._failures) >= _MAX_FAILURES:
                self._failures.clear()
            self._failures[ref.repo] = time.monotonic() + RETRY_AFTER_S, reason
            raise HubUnavailable(reason) from None
