"""Measuring the link to a peer: round trips on one connection to its fileserver, and a short transfer. Blocks.

It uses plain sockets in a thread, so that the event loop's delays are not measured.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from http.client import HTTPConnection, HTTPException
from time import perf_counter

import msgspec

from shoal_common.identity.peer_links import PeerLinks
from shoal_common.messages.liveness import NodeAddress
from shoal_placement.network.model import transfer_rate

PROBE_PATH = "/v1/probe"
CONNECT_TIMEOUT_S = 1.5
READ_TIMEOUT_S = 2.0
MAX_ADDRESSES = 3
"""Addresses of a peer that are tried."""
ROUND_TRIP_COUNT = 6
MAX_TRANSFER_BYTES = 4 << 20
_TRANSFER_S = 0.05
_ROUND_TRIPS = 10
"""A transfer lasts _TRANSFER_S, or this many round trips if that is longer: TCP starts slowly."""
_MAX_TRANSFER_S = 0.5
_READ_BYTES = 64 << 10
_SMALL_BYTES = 4096


class LinkMeasurement(msgspec.Struct, frozen=True):
    """The shortest round trip, and the bytes per second received; 0 if the peer sends none."""

    round_trip_s: float
    bytes_per_s: float


def connect(node: str, links: Sequence[NodeAddress], peer_links: PeerLinks) -> tuple[NodeAddress, HTTPConnection]:
    """Return a connection to the first address where the node answers, and that address. Raises OSError."""
    error = OSError("it publishes no address that may be used")
    for link in links[:MAX_ADDRESSES]:
        host, _, port = link.address.rpartition(":")
        connection = HTTPConnection(host.strip("[]"), int(port), timeout=CONNECT_TIMEOUT_S)
        try:
            connection.connect()
            if tls := peer_links.tls(node, link):
                context, server_hostname = tls
                connection.sock = context.wrap_socket(connection.sock, server_hostname=server_hostname)
        except OSError as e:
            connection.close()
            error = e
            continue
        connection.sock.settimeout(READ_TIMEOUT_S)
        return link, connection
    raise error


def measure_link(connection: HTTPConnection, token: Mapping[str, str]) -> LinkMeasurement:
    """Measure the link, and close the connection. Raises OSError.

    The answer of a peer that refuses, or of an earlier version that has no probe, is a round trip all the same.
    """
    try:
        shortest_s = float("inf")
        for _ in range(ROUND_TRIP_COUNT):
            began_s = perf_counter()
            connection.request("GET", PROBE_PATH, headers=dict(token))
            # Stop the clock before the response is decrypted and parsed.
            socket.socket.recv(connection.sock, 1, socket.MSG_PEEK)
            shortest_s = min(shortest_s, perf_counter() - began_s)
            response = connection.getresponse()
            response.read(_SMALL_BYTES)
            if response.status != 200 or not response.isclosed() or connection.sock is None:
                return LinkMeasurement(shortest_s, 0.0)
        return LinkMeasurement(shortest_s, _transfer(connection, token, shortest_s))
    except HTTPException as e:
        raise ConnectionError(f"the peer's answer is not a fileserver's: {e!r}") from e
    finally:
        connection.close()


def _transfer(connection: HTTPConnection, token: Mapping[str, str], round_trip_s: float) -> float:
    connection.request("GET", f"{PROBE_PATH}?bytes={MAX_TRANSFER_BYTES}", headers=dict(token))
    response = connection.getresponse()
    if response.status != 200:
        return 0.0
    until_s = min(max(_TRANSFER_S, _ROUND_TRIPS * round_trip_s), _MAX_TRANSFER_S)
    samples, got_bytes, began_s = [], 0, perf_counter()
    while received := response.read1(_READ_BYTES):
        got_bytes += len(received)
        samples.append((perf_counter() - began_s, got_bytes))
        if samples[-1][0] >= until_s:
            break
    return transfer_rate(samples)
