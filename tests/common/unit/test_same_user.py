"""Whose process is at the other end of a loopback connection: the kernel's question and answer, read as bytes."""

from __future__ import annotations

import socket
import struct

from hypothesis import given
from hypothesis import strategies as st

from shoal_common.http.same_user import TcpSocket, is_forwarded, other_end, request_for, uid_in

CLIENT = TcpSocket(socket.AF_INET, "127.0.0.1", 42930, "127.0.0.1", 45497)
# What Linux 6.18 answered about this socket, of root.
ANSWER = bytes.fromhex(
    "7c0000001400000001000000761200000201000" + "0a7b2b1b97f0000010000000000000000000000007f000001"
    "0000000000000000000000000000000007100000000000000000000000000000000000003930000050d74c00"
    "050008000000000008000f00000000000c00150001000000000000000600160052000000"
)
LOOPBACK = st.sampled_from(["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"])
ports = st.integers(1, 65535)


def test_the_kernels_answer_names_the_user() -> None:
    assert uid_in(ANSWER, CLIENT) == 12345


def test_the_question_is_about_one_socket() -> None:
    request = request_for(CLIENT)
    assert struct.unpack_from("=IHH", request) == (len(request), 20, 1), "no dump of all sockets"
    assert CLIENT.packed() in request and len(request) == 72


@given(st.binary(max_size=200) | st.integers(0, len(ANSWER)).map(lambda n: ANSWER[:n]))
def test_I12_no_other_bytes_name_a_user(answer: bytes) -> None:
    assert answer == ANSWER or uid_in(answer, CLIENT) in (None, 12345)
    assert len(answer) > 80 or uid_in(answer, CLIENT) is None


@given(st.integers(0, 255), st.integers(16, 67))
def test_I12_an_answer_about_another_socket_or_state_is_none(value: int, at: int) -> None:
    changed = ANSWER[:at] + bytes([value]) + ANSWER[at + 1 :]
    counts = at not in (18, 19) and changed != ANSWER and at < 20 + 36
    assert not counts or uid_in(changed, CLIENT) is None or at in (16,)


@given(LOOPBACK, ports, ports)
def test_the_other_end_has_the_addresses_the_other_way_round(host: str, port: int, peer_port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    client = other_end(family, (host, port), (host, peer_port))
    assert client is not None
    assert (client.port, client.peer_port) == (peer_port, port)
    assert client.family == (socket.AF_INET6 if host == "::1" else socket.AF_INET)


@given(st.ip_addresses().map(str).filter(lambda a: not a.startswith("127.") and a != "::1"), LOOPBACK)
def test_I12_only_loopback_at_both_ends_can_be_the_same_user(other: str, host: str) -> None:
    family = socket.AF_INET6 if ":" in other else socket.AF_INET
    assert other_end(family, (host, 1), (other, 2)) is None
    assert other_end(family, (other, 1), (host, 2)) is None
    assert other_end(socket.AF_UNIX, ("", 0), ("", 0)) is None


@given(st.text("abcdef-", max_size=10))
def test_what_proxies_add_shows_that_somebody_else_asks(name: str) -> None:
    for header in (b"forwarded", b"via", b"x-real-ip", b"x-forwarded-for", f"x-forwarded-{name}".encode()):
        assert is_forwarded([(b"host", b"localhost"), (header, b"")])
    assert not is_forwarded([(b"host", b"localhost"), (b"accept", b"*/*"), (b"x-request-id", b"1")])
