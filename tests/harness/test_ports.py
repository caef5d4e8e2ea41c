"""A test's port stays its own while its server restarts."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.harness import ports
from tests.harness.ports import ReservedPort


def test_a_reserved_port_is_given_to_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    first = ReservedPort()
    other = ReservedPort()
    offered = iter([first.number, first.number, other.number])
    del other
    monkeypatch.setattr(ports, "free_port", lambda host: next(offered))
    assert ReservedPort().number != first.number


def test_ports_reserved_at_once_differ() -> None:
    with ThreadPoolExecutor(8) as pool:
        reserved = list(pool.map(lambda _: ReservedPort(), range(64)))
    assert len({r.number for r in reserved}) == 64


def test_nobody_answers_at_a_closed_port(closed_port: int) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", closed_port), timeout=5)
