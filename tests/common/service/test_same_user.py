"""Whose process is at the other end of a loopback connection, asked of this machine's kernel."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from shoal_common.http import same_user
from shoal_common.http.same_user import TcpSocket, is_same_user
from tests.harness.networks import machines
from tests.harness.other_user import OTHER_UID

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells whose a connection is")
ENDS = [
    ("127.0.0.1", "127.0.0.1"),
    ("::1", "::1"),
    ("::", "127.0.0.1"),
    ("::", "::ffff:127.0.0.1"),
    ("0.0.0.0", "127.0.0.9"),
]
_CHILD = """
import os, socket, sys
host, port, uid = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if uid:
    os.setgroups([])
    os.setuid(uid)
connection = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
connection.connect((host, port))
print("connected", flush=True)
sys.stdin.read()
"""


@contextmanager
def accepted(listen: str, connect: str, uid: int = 0) -> Iterator[socket.socket]:
    """A connection of a child process, of another user if `uid` is given."""
    family = socket.AF_INET6 if ":" in listen else socket.AF_INET
    with socket.create_server((listen, 0), family=family, dualstack_ipv6=listen == "::") as listener:
        port = str(listener.getsockname()[1])
        child = subprocess.Popen(
            [sys.executable, "-S", "-c", _CHILD, connect, port, str(uid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            connection, _ = listener.accept()
            with connection:
                yield connection
        finally:
            child.communicate(timeout=30)


@pytest.mark.parametrize(("listen", "connect"), ENDS)
def test_a_process_of_this_user_is_known(listen: str, connect: str) -> None:
    with accepted(listen, connect) as connection:
        assert is_same_user(connection)


@pytest.mark.parametrize(("listen", "connect"), ENDS)
@pytest.mark.parametrize("uid", [OTHER_UID, 65534])
def test_I12_a_process_of_another_user_is_not(listen: str, connect: str, uid: int) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    with accepted(listen, connect, uid) as connection:
        assert not is_same_user(connection)


def test_I12_root_is_another_user_than_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can connect as root")
    with accepted("127.0.0.1", "127.0.0.1") as connection:
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        assert not is_same_user(connection)


def test_I12_a_user_whom_the_kernel_cannot_name_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    # A user that this user namespace lacks is shown as the overflow id, and so may this process be.
    with accepted("127.0.0.1", "127.0.0.1", same_user.overflow_uid()) as connection:
        monkeypatch.setattr(os, "geteuid", same_user.overflow_uid)
        assert not is_same_user(connection)


def test_I12_a_connection_that_has_gone_is_nobodys() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        connection, _ = listener.accept()
        with closing(connection):
            assert is_same_user(connection)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()
            assert not is_same_user(connection)


def taken_over(listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    """Return a connection that was reset, and the socket that has its port now."""
    while True:
        first = socket.create_connection(listener.getsockname())
        port = first.getsockname()[1]
        connection, _ = listener.accept()
        first.sendall(b"GET / HTTP/1.1\r\n")
        first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        first.close()
        second = socket.socket()
        second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            second.bind(("127.0.0.1", port))
            second.connect(listener.getsockname())
            return connection, second
        except OSError:  # another program has got the port
            connection.close()
            second.close()


def test_I12_a_port_that_was_taken_over_is_not_who_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody connects, sends, resets, and a process of this user gets the same port while the kernel is asked."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection, second = taken_over(listener)
        with closing(connection), closing(second):
            client = TcpSocket(socket.AF_INET, *second.getsockname(), *second.getpeername())
            assert same_user._uid_of(client) == os.geteuid() and connection.recv(16), (
                "what was sent can still be read"
            )
            monkeypatch.setattr(same_user, "other_end", lambda *_: client)
            monkeypatch.setattr(connection.__class__, "getpeername", lambda _: ("127.0.0.1", client.port))
            assert not is_same_user(connection)


def test_I12_another_network_namespace_is_another_machine() -> None:
    with machines("a") as (a,):
        listener = a.listener(0)
        with closing(listener):
            client = a.connection("127.0.0.1", listener.getsockname()[1])
            connection, _ = listener.accept()
            with closing(client), closing(connection):
                assert not is_same_user(connection), "this process asks its own namespace"


def test_a_connection_is_looked_up_in_no_time() -> None:
    with accepted("127.0.0.1", "127.0.0.1") as connection:
        took_s = []
        for _ in range(200):
            began_s = time.perf_counter()
            assert is_same_user(connection)
            took_s.append(time.perf_counter() - began_s)
    assert min(took_s) < 0.002, min(took_s)
