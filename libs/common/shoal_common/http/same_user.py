"""Whether the other end of a loopback connection is a process of this process's user. Linux alone tells.

The kernel is asked for the one socket at the other end (sock_diag(7)): 20 µs, however many sockets there are, where
/proc/net/tcp is written out whole, 100 ms for 8,000. Whatever is in doubt is another user: another network
namespace, a user whom this user namespace does not have, a connection that is not or no longer established.

It is the user who made the socket. What forwards connections as this user (`ssh -L`, socat, a container's network
of a user's own) cannot be told apart, except by the headers that proxies add to a request.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from ipaddress import IPv6Address, ip_address
from pathlib import Path

import msgspec

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_ESTABLISHED = 1
_ANY_COOKIE = 0xFFFFFFFF
_HEADER = struct.Struct("=IHHII")  # nlmsghdr
_REQUEST_HEAD = struct.Struct("=BBBBI")  # inet_diag_req_v2 up to its inet_diag_sockid
_SOCKET_ID = struct.Struct("!HH16s16s")  # inet_diag_sockid: ports and addresses
_SOCKET_ID_TAIL = struct.Struct("=III")  # interface, cookie
_ANSWER_HEAD = struct.Struct("=BBBB")  # inet_diag_msg up to its inet_diag_sockid
_ANSWER_TAIL = struct.Struct("=IIIII")  # expires, rqueue, wqueue, uid, inode
_MAX_ANSWER_BYTES = 4096
_TIMEOUT_S = 0.2
_OVERFLOW_UID = 65534

_FORWARDING_HEADERS = (b"forwarded", b"via", b"x-real-ip", b"x-client-ip")
_FORWARDING_PREFIX = b"x-forwarded-"


class TcpSocket(msgspec.Struct, frozen=True):
    """One end of a TCP connection: its own address and port, and those of the other end."""

    family: int
    host: str
    port: int
    peer_host: str
    peer_port: int

    def packed(self) -> bytes:
        """Return the kernel's name for it."""
        own, peer = (socket.inet_pton(self.family, host).ljust(16, b"\0") for host in (self.host, self.peer_host))
        return _SOCKET_ID.pack(self.port, self.peer_port, own, peer)


def is_same_user(connection: socket.socket) -> bool:
    """Return whether a process of this user is at the other end of an accepted connection, over loopback.

    For a few µs it blocks on the kernel, never on a disk or a peer.
    """
    uid = os.geteuid()
    if sys.platform != "linux" or uid == overflow_uid():
        return False
    with suppress(OSError):
        client = other_end(connection.family, connection.getsockname(), connection.getpeername())
        # Ours is established after the other end was asked for, and so was all the while: while it is, nobody else
        # can have a socket with these addresses and ports.
        return client is not None and _uid_of(client) == uid and _is_established(connection)
    return False


def other_end(family: int, own: tuple[object, ...], peer: tuple[object, ...]) -> TcpSocket | None:
    """Return the client's socket of an accepted connection; None if it is not over loopback. Pure."""
    if family not in (socket.AF_INET, socket.AF_INET6):
        return None
    hosts = [_plain(str(peer[0])), _plain(str(own[0]))]
    if hosts[0] is None or hosts[1] is None or (":" in hosts[0]) != (":" in hosts[1]):
        return None
    # What comes in over IPv4 to a socket of both is IPv4 at the other end.
    plain_family = socket.AF_INET6 if ":" in hosts[0] else socket.AF_INET
    return TcpSocket(plain_family, hosts[0], int(str(peer[1])), hosts[1], int(str(own[1])))


def _plain(host: str) -> str | None:
    """Return a loopback address, a mapped one as IPv4; None for any other."""
    with suppress(ValueError):
        address = ip_address(host)
        address = (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address
        return str(address) if address.is_loopback else None
    return None


def request_for(client: TcpSocket) -> bytes:
    """Return the message that asks the kernel for one socket. Pure."""
    body = _REQUEST_HEAD.pack(client.family, socket.IPPROTO_TCP, 0, 0, 1 << _ESTABLISHED) + client.packed()
    body += _SOCKET_ID_TAIL.pack(0, _ANY_COOKIE, _ANY_COOKIE)
    return _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0) + body


def uid_in(answer: bytes, client: TcpSocket) -> int | None:
    """Return the user in the kernel's answer; None unless it is about this socket, established. Pure."""
    name = client.packed()
    end = _HEADER.size + _ANSWER_HEAD.size + len(name) + _SOCKET_ID_TAIL.size
    if len(answer) < end + _ANSWER_TAIL.size:
        return None
    _, kind, _, _, _ = _HEADER.unpack_from(answer)
    family, state, _, _ = _ANSWER_HEAD.unpack_from(answer, _HEADER.size)
    if kind != _SOCK_DIAG_BY_FAMILY or state != _ESTABLISHED or family not in (socket.AF_INET, socket.AF_INET6):
        return None
    # A client's socket of both has its IPv4 addresses mapped.
    if answer[_HEADER.size + _ANSWER_HEAD.size :][: len(name)] not in (name, _mapped(client)):
        return None
    uid: int = _ANSWER_TAIL.unpack_from(answer, end)[3]
    return uid


def _mapped(client: TcpSocket) -> bytes:
    if client.family != socket.AF_INET:
        return b""
    own, peer = (bytes(10) + b"\xff\xff" + socket.inet_aton(host) for host in (client.host, client.peer_host))
    return _SOCKET_ID.pack(client.port, client.peer_port, own, peer)


def _uid_of(client: TcpSocket) -> int | None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as kernel:
        kernel.settimeout(_TIMEOUT_S)
        kernel.sendto(request_for(client), (0, 0))
        return uid_in(kernel.recv(_MAX_ANSWER_BYTES), client)


def _is_established(connection: socket.socket) -> bool:
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == bytes([_ESTABLISHED])


@cache
def overflow_uid() -> int:
    """Return the user id that stands for all users whom this user namespace does not have."""
    with suppress(OSError, ValueError):
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    return _OVERFLOW_UID


def is_forwarded(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Return whether a proxy sent a request for somebody else. Names of headers are in lower case. Pure."""
    return any(name in _FORWARDING_HEADERS or name.startswith(_FORWARDING_PREFIX) for name, _ in headers)
