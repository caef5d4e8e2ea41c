"""Asking every node's fileserver, from here, whether it answers and what time it has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime

import httpx2

from shoal_cli.doctor.checks.clocks import ClockOffset
from shoal_cli.doctor.checks.peers import AddressReach, FileserverReach
from shoal_cli.doctor.checks.reachability import OsInfo
from shoal_cli.doctor.probes.nats import LivenessSample
from shoal_cli.doctor.probes.tcp_connect import classify_connect_error, connect
from shoal_common.host.addresses import reachable_addresses
from shoal_common.host.credentials import bearer
from shoal_common.host.process_identity import network_id

_CONNECT_TIMEOUT_S = 3.0
_ANSWER_TIMEOUT_S = 3.0
MAX_PEERS = 64
MAX_ADDRESSES = 4
_MAX_CONCURRENT = 32
_FILESERVER_STATUSES = (200, 401)
_DATE_ERROR_S = 1.5
"""An HTTP date is a whole second, and the server makes it once a second."""


async def probe(
    samples: Mapping[tuple[str, str], LivenessSample], secret: str, system: OsInfo
) -> tuple[list[FileserverReach], dict[str, ClockOffset]]:
    """Return how each fileserver is reached from here, and its clock against ours by node."""
    found = sorted((n, s) for (n, service), s in samples.items() if service == "fileserver")[:MAX_PEERS]
    semaphore = asyncio.Semaphore(_MAX_CONCURRENT)
    probed = await asyncio.gather(*(_probe_node(node, sample, secret, system, semaphore) for node, sample in found))
    return [reach for reach, _ in probed], {reach.node: offset for reach, offset in probed if offset is not None}


async def _probe_node(
    node: str, sample: LivenessSample, secret: str, system: OsInfo, semaphore: asyncio.Semaphore
) -> tuple[FileserverReach, ClockOffset | None]:
    live, network = sample.live, network_id()
    addresses = [link.address for link in reachable_addresses(live, network, system.interfaces)][:MAX_ADDRESSES]
    probed = await asyncio.gather(*(_probe_address(address, node, secret, semaphore) for address in addresses))
    published = list(dict.fromkeys([*live.facts.addresses, *(link.address for link in live.facts.links)]))
    is_remote = live.holder.network_namespace != network
    reach = FileserverReach(node=node, published=published, tried=[a for a, _ in probed], is_remote=is_remote)
    offsets = [offset for _, offset in probed if offset is not None]
    return reach, min(offsets, key=lambda o: o.error_s, default=None)


async def _probe_address(
    address: str, node: str, secret: str, semaphore: asyncio.Semaphore
) -> tuple[AddressReach, ClockOffset | None]:
    async with semaphore:
        host, _, port = address.rpartition(":")
        try:
            resolved, _, writer = await connect(host.strip("[]"), int(port), _CONNECT_TIMEOUT_S)
            writer.close()
        except (OSError, TimeoutError, ValueError) as e:
            error, reason = classify_connect_error(e)
            return AddressReach(address=address, error=error, reason=reason), None
        netloc = f"[{resolved}]:{port}" if ":" in resolved else f"{resolved}:{port}"
        try:
            async with httpx2.AsyncClient(trust_env=False, timeout=_ANSWER_TIMEOUT_S) as http:
                began_s = time.time()
                response = await http.get(f"http://{netloc}/health", headers=bearer(secret, "blobs"))
                ended_s = time.time()
        except httpx2.TimeoutException:
            return AddressReach(address=address, error="no_reply"), None
        except (httpx2.HTTPError, OSError) as e:
            reason = f"it accepts the connection, then fails ({type(e).__name__})"
            return AddressReach(address=address, error="broken", reason=reason), None
    return AddressReach(address=address, status=response.status_code), _clock(node, response, began_s, ended_s)


def _clock(node: str, response: httpx2.Response, began_s: float, ended_s: float) -> ClockOffset | None:
    """Return its clock against ours, as precisely as an HTTP date tells."""
    if response.status_code not in _FILESERVER_STATUSES:
        return None  # another program answered, perhaps of another machine
    with suppress(ValueError, TypeError):
        remote_s = parsedate_to_datetime(response.headers.get("date", "")).timestamp() + 0.5
        return ClockOffset(node, remote_s - (began_s + ended_s) / 2, _DATE_ERROR_S + (ended_s - began_s) / 2)
    return None
