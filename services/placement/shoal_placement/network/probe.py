"""Measuring the link to a peer: round trips on one connection to its fileserver, and a short transfer. Blocks.

It uses plain sockets in a thread, so that the event loop's delays are not measured.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from http.client import HTTPConnection, HTTPException
from time import perf_counter

import msgspec

from shoal_common.messages.liveness import Link
from shoal_placement.network.model import rate

PATH = "/v1/probe"
CONNECT_S = 1.5
SILENCE_S = 2.0
MOST_WAYS = 3
"""Addresses of a peer that are tried."""
EXCHANGES = 6
MOST_BYTES = 4 << 20
_TRANSFER_S = 0.05
_ROUND_TRIPS = 10
"""A transfer lasts _TRANSFER_S, or this many round trips if that is longer: TCP starts slowly."""
_MAX_TRANSFER_S = 0.5
_READ_BYTES = 64 << 10
_SMALL_BYTES = 4096


class Found(msgspec.Struct, frozen=True):
    """The shortest round trip, and the bytes per second received; 0 if the peer sends none."""

    round_trip_s: float
    bytes_per_s: float


def connect(addresses: Sequence[Link]) -> tuple[Link, HTTPConnection]:
    """Return a connection to the first address that accepts one, and that address. Raises OSError."""
    error = OSError("it publishes no address")
    for link in addresses[:MOST_WAYS]:
        host, _, port = link.address.rpartition(":")
        connection = HTTPConnection(host.strip("[]"), int(port), timeout=CONNECT_S)
        try:
            connection.connect()
        except OSError as e:
            error = e
            continue
        connection.sock.settimeout(SILENCE_S)
        return link, connection
    raise error


def measure(connection: HTTPConnection, token: Mapping[str, str]) -> Found:
    """Measure the link, and close the connection. Raises OSError.

    The answer of a peer that refuses, or of an earlier version that has no probe, is a round trip all the same.
    """
    try:
        shortest_s = float("inf")
        for _ in range(EXCHANGES):
            began_s = perf_counter()
            connection.request("GET", PATH, headers=dict(token))
            connection.sock.recv(1, socket.MSG_PEEK)  # stop the clock before the response is parsed
            shortest_s = min(shortest_s, perf_counter() - began_s)
            response = connection.getresponse()
            response.read(_SMALL_BYTES)
            if response.status != 200 or not response.isclosed() or connection.sock is None:
                return Found(shortest_s, 0.0)
        return Found(shortest_s, _transfer(connection, token, shortest_s))
    except HTTPException as e:
        raise ConnectionError(f"the peer's answer is not a fileserver's: {e!r}") from e
    finally:
        connection.close()


def _transfer(connection: HTTPConnection, token: Mapping[str, str], round_trip_s: float) -> float:
    connection.request("GET", f"{PATH}?bytes={MOST_BYTES}", headers=dict(token))
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
    return rate(samples)
