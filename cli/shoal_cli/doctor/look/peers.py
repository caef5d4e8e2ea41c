"""Asking every node's fileserver, from here, whether it is there; and what time it has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime

import httpx2

from shoal_cli.doctor.clocks import Offset
from shoal_cli.doctor.look.dialling import dial, trouble_of
from shoal_cli.doctor.look.nats import Beat
from shoal_cli.doctor.peers import Peer, Way
from shoal_cli.doctor.reaching import System
from shoal_common.credentials import bearer
from shoal_common.identity import this_network
from shoal_common.reach import ways

_DIAL_S = 3.0
_ANSWER_S = 3.0
MOST_PEERS = 64
MOST_WAYS = 4
_AT_ONCE = 32
_OF_A_FILESERVER = (200, 401)
_DATE_WITHIN_S = 1.5
"""An HTTP date is of a whole second, and the server makes it once a second."""


async def look(
    beats: Mapping[tuple[str, str], Beat], secret: str, system: System
) -> tuple[list[Peer], dict[str, Offset]]:
    """All fileservers, as they are reached from here, and our clock against theirs."""
    found = sorted((n, b) for (n, service), b in beats.items() if service == "fileserver")[:MOST_PEERS]
    turns = asyncio.Semaphore(_AT_ONCE)
    asked = await asyncio.gather(*(_peer(node, beat, secret, system, turns) for node, beat in found))
    return [peer for peer, _ in asked], {peer.node: offset for peer, offset in asked if offset is not None}


async def _peer(
    node: str, beat: Beat, secret: str, system: System, turns: asyncio.Semaphore
) -> tuple[Peer, Offset | None]:
    live, network = beat.live, this_network()
    addresses = [link.address for link in ways(live, network, system.interfaces)][:MOST_WAYS]
    asked = await asyncio.gather(*(_way(address, node, secret, turns) for address in addresses))
    told = list(dict.fromkeys([*live.facts.addresses, *(link.address for link in live.facts.links)]))
    peer = Peer(node=node, told=told, ways=[way for way, _ in asked], elsewhere=live.holder.network != network)
    offsets = [offset for _, offset in asked if offset is not None]
    return peer, min(offsets, key=lambda o: o.within_s, default=None)


async def _way(address: str, node: str, secret: str, turns: asyncio.Semaphore) -> tuple[Way, Offset | None]:
    async with turns:
        host, _, port = address.rpartition(":")
        try:
            resolved, _, writer = await dial(host.strip("[]"), int(port), _DIAL_S)
            writer.close()
        except (OSError, TimeoutError, ValueError) as e:
            trouble, why = trouble_of(e)
            return Way(address=address, trouble=trouble, why=why), None
        at = f"[{resolved}]:{port}" if ":" in resolved else f"{resolved}:{port}"
        try:
            async with httpx2.AsyncClient(trust_env=False, timeout=_ANSWER_S) as http:
                began_s = time.time()
                response = await http.get(f"http://{at}/health", headers=bearer(secret, "blobs"))
                ended_s = time.time()
        except httpx2.TimeoutException:
            return Way(address=address, trouble="mute"), None
        except (httpx2.HTTPError, OSError) as e:
            why = f"it connects, and then fails ({type(e).__name__})"
            return Way(address=address, trouble="broken", why=why), None
    return Way(address=address, status=response.status_code), _clock(node, response, began_s, ended_s)


def _clock(node: str, response: httpx2.Response, began_s: float, ended_s: float) -> Offset | None:
    """Their clock against ours, as closely as an HTTP date says."""
    if response.status_code not in _OF_A_FILESERVER:
        return None  # another program's, on another machine perhaps
    with suppress(ValueError, TypeError):
        theirs_s = parsedate_to_datetime(response.headers.get("date", "")).timestamp() + 0.5
        return Offset(node, theirs_s - (began_s + ended_s) / 2, _DATE_WITHIN_S + (ended_s - began_s) / 2)
    return None
