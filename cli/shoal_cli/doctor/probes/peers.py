"""Asking every node's fileserver, from here, whether it answers and what time it has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime

import httpx2
import msgspec

from shoal_cli.doctor.checks.clocks import ClockOffset
from shoal_cli.doctor.checks.peers import AddressReach, FileserverReach, PortReach
from shoal_cli.doctor.probes.local_node import LocalNode
from shoal_cli.doctor.probes.nats import LivenessSample
from shoal_cli.doctor.probes.tcp_connect import classify_connect_error, connect
from shoal_cli.doctor.reachability import OsInfo
from shoal_common.bus import cluster_clock
from shoal_common.errors import Denied
from shoal_common.host.addresses import filter_reachable, reachable_addresses, sort_by_preference
from shoal_common.host.process_identity import network_id
from shoal_common.identity.node_identity import load_identity
from shoal_common.identity.peer_links import PeerLinks
from shoal_common.identity.peer_secrets import PeerSecrets
from shoal_common.identity.peer_tokens import HEALTH_NAME, PeerTokens
from shoal_common.messages.instances import StageState
from shoal_common.messages.liveness import NodeAddress
from shoal_common.settings.node import STAGE_PORT_COUNT, EncryptionSettings
from shoal_common.settings.values import read_valid_settings

_CONNECT_TIMEOUT_S = 3.0
_ANSWER_TIMEOUT_S = 3.0
MAX_PEERS = 64
MAX_ADDRESSES = 4
_MAX_CONCURRENT = 32
_MAX_PORTS = 128
"""All of them silent take 12 s."""
_FILESERVER_STATUSES = (200, 401)
_DATE_ERROR_S = 1.5
"""An HTTP date is a whole second, and the server makes it once a second."""


class _Access(msgspec.Struct, frozen=True):
    """How this node speaks to others."""

    tokens: PeerTokens
    links: PeerLinks


def _access(local: LocalNode, certificates: Mapping[str, str]) -> _Access:
    identity = load_identity(local.home, local.node) if local.node else None
    settings, _ = read_valid_settings(EncryptionSettings, local.settings, local.environ)
    secrets = PeerSecrets(identity, certificates.get)
    return _Access(PeerTokens(local.node, secrets), PeerLinks(identity, not settings.encrypt_weights))


async def probe(
    samples: Mapping[tuple[str, str], LivenessSample],
    local: LocalNode,
    certificates: Mapping[str, str],
    system: OsInfo,
) -> tuple[list[FileserverReach], dict[str, ClockOffset]]:
    """Return how each fileserver is reached from here, and its clock against ours by node.

    `certificates` are those of the cluster's members.
    """
    access = await asyncio.to_thread(_access, local, certificates)
    found = sorted((n, s) for (n, service), s in samples.items() if service == "fileserver")[:MAX_PEERS]
    semaphore = asyncio.Semaphore(_MAX_CONCURRENT)
    probed = await asyncio.gather(*(_probe_node(node, sample, access, system, semaphore) for node, sample in found))
    return [reach for reach, _ in probed], {reach.node: offset for reach, offset in probed if offset is not None}


async def probe_ports(
    samples: Mapping[tuple[str, str], LivenessSample],
    stages: Sequence[StageState],
    fileservers: Sequence[FileserverReach],
    node: str,
    system: OsInfo,
) -> list[PortReach]:
    """Return whether the ports of other nodes' gateways and stages accept connections from here.

    Where no stage listens, the first and the last of the node's ports for stages tell whether a firewall drops what
    is sent there: they refuse, or do not answer.
    """
    network, others = network_id(), {n for n, _ in samples if n != node}
    wanted: list[tuple[str, str, list[str]]] = []
    for (other, service), sample in sorted(samples.items()):
        if other in others and service == "gateway":
            links = reachable_addresses(sample.live, network, system.interfaces)
            wanted.append((other, service, [link.address for link in links]))
    for stage in stages:
        if stage.node in others and stage.links:
            links = sort_by_preference(filter_reachable(stage.links, same_host=False), system.interfaces)
            wanted.append((stage.node, "stage", [link.address for link in links]))
    for reach in fileservers:
        host = next((a.address.rpartition(":")[0] for a in reach.tried if a.is_good), "")
        inference = samples.get((reach.node, "inference"))
        first = inference.live.facts.stage_port if inference else 0
        if reach.node in others and reach.is_remote and host and first:
            ports = (first, first + STAGE_PORT_COUNT - 1)
            wanted += [(reach.node, "stages", [f"{host}:{port}"]) for port in ports]
    semaphore = asyncio.Semaphore(_MAX_CONCURRENT)

    async def reached(other: str, service: str, addresses: list[str]) -> PortReach:
        tried = await asyncio.gather(*(_connects(a, semaphore) for a in addresses[:MAX_ADDRESSES]))
        return PortReach(node=other, service=service, tried=tried)

    return list(await asyncio.gather(*(reached(*port) for port in wanted[:_MAX_PORTS])))


async def _connects(address: str, semaphore: asyncio.Semaphore) -> AddressReach:
    host, _, port = address.rpartition(":")
    async with semaphore:
        try:
            _, _, writer = await connect(host.strip("[]"), int(port), _CONNECT_TIMEOUT_S)
            writer.close()
        except (OSError, TimeoutError, ValueError) as e:
            error, reason = classify_connect_error(e)
            return AddressReach(address=address, error=error, reason=reason)
    return AddressReach(address=address)


async def _probe_node(
    node: str, sample: LivenessSample, access: _Access, system: OsInfo, semaphore: asyncio.Semaphore
) -> tuple[FileserverReach, ClockOffset | None]:
    live, network = sample.live, network_id()
    links = reachable_addresses(live, network, system.interfaces)[:MAX_ADDRESSES]
    probed = await asyncio.gather(*(_probe_link(link, node, access, semaphore) for link in links))
    published = list(dict.fromkeys([*live.facts.addresses, *(link.address for link in live.facts.links)]))
    is_remote = live.holder.network_namespace != network
    reach = FileserverReach(node=node, published=published, tried=[a for a, _ in probed], is_remote=is_remote)
    offsets = [offset for _, offset in probed if offset is not None]
    return reach, min(offsets, key=lambda o: o.error_s, default=None)


async def _probe_link(
    link: NodeAddress, node: str, access: _Access, semaphore: asyncio.Semaphore
) -> tuple[AddressReach, ClockOffset | None]:
    address = link.address
    if not access.links.is_usable(link):
        reason = "this node has no identity" if link.tls else "it does not encrypt, and encrypt_weights is true here"
        return AddressReach(address=address, error="broken", reason=reason), None
    async with semaphore:
        host, _, port = address.rpartition(":")
        try:
            resolved, _, writer = await connect(host.strip("[]"), int(port), _CONNECT_TIMEOUT_S)
            writer.close()
        except (OSError, TimeoutError, ValueError) as e:
            error, reason = classify_connect_error(e)
            return AddressReach(address=address, error=error, reason=reason), None
        netloc = f"[{resolved}]:{port}" if ":" in resolved else f"{resolved}:{port}"
        tls, headers = access.links.tls(node, link), dict[str, str]()
        with suppress(Denied):  # no member: it will say so itself
            headers = access.tokens.token(node, HEALTH_NAME, cluster_clock.now_s())
        try:
            context, extensions = (tls[0], {"sni_hostname": tls[1]}) if tls else (True, {})
            async with httpx2.AsyncClient(verify=context, trust_env=False, timeout=_ANSWER_TIMEOUT_S) as http:
                began_s = time.time()
                url = f"http{'s' if tls else ''}://{netloc}/health"
                response = await http.get(url, headers=headers, extensions=extensions)
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
