"""Measuring the way to a peer: round trips on one connection to its fileserver, and a short transfer. Blocks.

By plain sockets in a thread, so that no event loop's turn is in the times.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from http.client import HTTPConnection, HTTPException
from time import perf_counter

import msgspec

from shoal_common.messages.facts import Link
from shoal_placement.links import rate

PATH = "/v1/probe"
CONNECT_S = 1.5
SILENCE_S = 2.0
MOST_WAYS = 3
"""Addresses of a peer that are tried."""
EXCHANGES = 6
MOST_BYTES = 4 << 20
_TRANSFER_S = 0.05
_ROUND_TRIPS = 10
"""A transfer lasts _TRANSFER_S, or so many round trips where that is more: TCP begins slowly."""
_MOST_TRANSFER_S = 0.5
_PIECE_BYTES = 64 << 10
_SMALL_BYTES = 4096


class Found(msgspec.Struct, frozen=True):
    """Seconds of the shortest round trip, and bytes a second that came; 0 where the peer gives no bytes."""

    round_trip_s: float
    bytes_per_s: float


def connect(ways: Sequence[Link]) -> tuple[Link, HTTPConnection]:
    """A connection by the first of these that leads to somebody. Raises OSError."""
    error = OSError("it tells no address")
    for link in ways[:MOST_WAYS]:
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
    """Measure, and close the connection. Raises OSError.

    A peer that refuses, or knows no probes as an earlier version, has answered all the same: that is a round trip.
    """
    try:
        least_s = float("inf")
        for _ in range(EXCHANGES):
            began_s = perf_counter()
            connection.request("GET", PATH, headers=dict(token))
            connection.sock.recv(1, socket.MSG_PEEK)  # before anything is made of it
            least_s = min(least_s, perf_counter() - began_s)
            response = connection.getresponse()
            response.read(_SMALL_BYTES)
            if response.status != 200 or not response.isclosed() or connection.sock is None:
                return Found(least_s, 0.0)
        return Found(least_s, _transfer(connection, token, least_s))
    except HTTPException as e:
        raise ConnectionError(f"what answers is no fileserver: {e!r}") from e
    finally:
        connection.close()


def _transfer(connection: HTTPConnection, token: Mapping[str, str], round_trip_s: float) -> float:
    connection.request("GET", f"{PATH}?bytes={MOST_BYTES}", headers=dict(token))
    response = connection.getresponse()
    if response.status != 200:
        return 0.0
    until_s = min(max(_TRANSFER_S, _ROUND_TRIPS * round_trip_s), _MOST_TRANSFER_S)
    taken, got, began_s = [], 0, perf_counter()
    while piece := response.read1(_PIECE_BYTES):
        got += len(piece)
        taken.append((perf_counter() - began_s, got))
        if taken[-1][0] >= until_s:
            break
    return rate(taken)
