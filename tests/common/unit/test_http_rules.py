"""The pure rules of an HTTP server: whom it answers, which connection makes way, what fits its open files."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_common.http.bounds import HttpBounds, fit_to_files
from shoal_common.http.connection_eviction import (
    REFUSE_NEW,
    STALL_TIMEOUT_S,
    ConnectionInfo,
    connection_to_evict,
)
from shoal_common.http.host_rule import host_error, names_loopback
from shoal_common.http.scheme import gateway_scheme
from shoal_common.settings.node import TlsMode

BOUNDS = HttpBounds(max_connections=256, max_per_address=128, max_body_bytes=1, max_bodies_bytes=1)

SEEN = st.builds(
    ConnectionInfo,
    host=st.sampled_from(["a", "b", "c"]),
    idle_s=st.none() | st.floats(0, 100),
    stalled_s=st.none() | st.floats(0, 100),
)


@given(st.sampled_from(["a", "b", "d"]), st.lists(SEEN, max_size=40).map(lambda some: some * 8))
def test_a_connection_is_evicted_only_if_full_and_never_a_reader(host: str, others: list[ConnectionInfo]) -> None:
    own = [seen for seen in others if seen.host == host]
    found = connection_to_evict(host, others, BOUNDS)
    if len(own) < BOUNDS.max_per_address and len(others) < BOUNDS.max_connections:
        assert found is None
        return
    assert found is not None
    if isinstance(found, int):
        gone = others[found]
        assert gone.idle_s is not None or (gone.stalled_s is not None and gone.stalled_s >= STALL_TIMEOUT_S)
        if len(own) >= BOUNDS.max_per_address:
            assert gone.host == host
    elif len(own) >= BOUNDS.max_per_address:
        assert found == REFUSE_NEW and all(
            seen.idle_s is None and (seen.stalled_s or 0) < STALL_TIMEOUT_S for seen in own
        )


def evicted(host: str, *others: ConnectionInfo) -> int | str | None:
    """Return what `connection_to_evict` decides."""
    return connection_to_evict(host, others, BOUNDS)


def test_eviction_takes_the_busiest_address_and_idle_ones_first() -> None:
    each = BOUNDS.max_per_address
    busy = [ConnectionInfo("a")] * (each - 1) + [ConnectionInfo("b")] * (each - 1)
    idle, stalled = ConnectionInfo("c", idle_s=9), ConnectionInfo("c", stalled_s=9)
    assert evicted("c", *busy, ConnectionInfo("a", idle_s=1), idle) == len(busy)
    assert evicted("c", *busy, ConnectionInfo("a", stalled_s=3), idle) == len(busy) + 1
    assert evicted("c", *busy, ConnectionInfo("a", stalled_s=3), stalled) == len(busy)
    assert evicted("c", *busy, ConnectionInfo("a", stalled_s=0.1), stalled) == REFUSE_NEW
    assert evicted("a", *[ConnectionInfo("a")] * each) == REFUSE_NEW
    assert evicted("c", *[ConnectionInfo("a")] * each) is None


@given(st.integers(1, 1 << 20), st.integers(1, 2))
def test_bounds_fit_into_the_files_a_process_may_open(max_files: int, files_each: int) -> None:
    wanted = HttpBounds(
        max_connections=768,
        max_per_address=640,
        max_body_bytes=1,
        max_bodies_bytes=1,
        files_per_connection=files_each,
    )
    fitting = fit_to_files(wanted, max_files)
    assert 1 <= fitting.max_per_address <= fitting.max_connections <= wanted.max_connections
    if max_files >= 128:
        open_files = fitting.max_connections * files_each + fitting.max_refused + fitting.backlog
        assert open_files + 64 <= max_files
        assert fitting.max_connections >= 16
    if max_files >= 4096:
        assert fitting == wanted


def error_status(target: bytes, *hosts: bytes, loopback_only: bool = True) -> int | None:
    """Return the status of the error for a request with these Host headers, or None."""
    headers = [(b"accept", b"*/*"), *((b"host", host) for host in hosts)]
    error = host_error(target, headers, loopback_only)
    return None if error is None else error.http_status


@pytest.mark.parametrize("host", [b"127.0.0.1:8080", b"localhost", b"LOCALHOST:1", b"[::1]:8080", b"127.0.0.2"])
def test_loopback_answers_to_its_own_names(host: bytes) -> None:
    assert error_status(b"/v1/status?a=http://b", host) is None


@pytest.mark.parametrize("host", [b"evil.example", b"127.0.0.1.evil.example", b"10.0.0.1:80", b"1", b"[::2]", b"."])
def test_I12_loopback_answers_to_no_other_name(host: bytes) -> None:
    assert error_status(b"/", host) == 403
    assert error_status(b"/", host, loopback_only=False) is None


@pytest.mark.parametrize(
    "host", [b"", b"[", b"u@localhost", b"u:w@localhost", b"localhost/", b"a,b", b"localhost:x", b"\xff", b"a b"]
)
def test_I12_what_is_no_host_is_refused_everywhere(host: bytes) -> None:
    assert error_status(b"/", host) == error_status(b"/", host, loopback_only=False) == 400


@given(st.lists(st.sampled_from([b"localhost", b"127.0.0.1"]), max_size=4), st.booleans())
def test_I12_only_one_host_is_taken(hosts: list[bytes], loopback_only: bool) -> None:
    assert (error_status(b"/", *hosts, loopback_only=loopback_only) is None) == (len(hosts) == 1)


@pytest.mark.parametrize(
    "target", [b"http://localhost/", b"http://u:w@localhost/", b"localhost:80", b"//", b"", b"x"]
)
def test_I12_a_target_is_a_path(target: bytes) -> None:
    assert error_status(target, b"localhost") == (None if target == b"//" else 400)


@pytest.mark.parametrize(
    ("bind", "is_member", "tls", "scheme"),
    [
        ("0.0.0.0", True, "auto", "https"),
        ("::", True, "auto", "https"),
        ("0.0.0.0", True, "off", "http"),
        ("0.0.0.0", False, "auto", "http"),
        ("127.0.0.1", True, "auto", "http"),
        ("::1", True, "auto", "http"),
        ("localhost", True, "auto", "http"),
    ],
)
def test_TLS_is_for_members_beyond_loopback(bind: str, is_member: bool, tls: TlsMode, scheme: str) -> None:
    assert gateway_scheme(bind, is_member, tls) == scheme


@pytest.mark.parametrize(
    ("hosts", "is_loopback"),
    [
        ([b"localhost:8080"], True),
        ([b"127.0.0.1"], True),
        ([b"[::1]:8080"], True),
        ([b"localhost.evil.example"], False),
        ([b"127.0.0.1.evil.example"], False),
        ([b"user@127.0.0.1"], False),
        ([b"192.0.2.1"], False),
        ([b"localhost", b"evil.example"], False),
        ([], False),
    ],
    ids=str,
)
def test_I12_only_loopbacks_own_names_are_this_machine(hosts: list[bytes], is_loopback: bool) -> None:
    assert names_loopback([(b"host", host) for host in hosts]) == is_loopback
