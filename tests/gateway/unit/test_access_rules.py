"""Who may call the gateway: the decision, the cookie of a login, and how often a key may be typed. No I/O."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_common.errors import Denied, ShoalError
from shoal_common.http.errors import CrossOriginForbidden
from shoal_gateway.access import login_attempts, login_cookie
from shoal_gateway.access.login_attempts import MAX_ADDRESSES, MAX_FAILURES, WINDOW_S, LoginAttempts
from shoal_gateway.access.rules import PUBLIC_PATHS, Caller, access, own_path, shown_key

KEY = f"shoal-{'k' * 43}"
STRANGER = Caller(is_own=False, has_login=False)
OWNER = Caller(is_own=True, has_login=False)
LOGGED_IN = Caller(is_own=False, has_login=True)
NOW_S = 1_700_000_000.0


def is_key(text: str) -> bool:
    return text == KEY


def asked(caller: Caller, method: str = "GET", path: str = "/v1/status", **headers: str) -> str | ShoalError:
    """Return what lets a request in; `sec_fetch_site="…"` is the header `sec-fetch-site`."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return access(method, path, {"host": "node:8080", **named}, caller, is_key)


@given(st.text(max_size=60).filter(lambda t: t.strip() != KEY), st.sampled_from(["Bearer ", "Basic ", "Digest ", ""]))
def test_I12_only_the_key_opens(word: str, scheme: str) -> None:
    assert isinstance(asked(STRANGER, authorization=scheme + word), Denied)


def test_the_key_is_a_bearer_or_a_password() -> None:
    basic = base64.b64encode(f"anyone:{KEY}".encode()).decode()
    for header in (f"Bearer {KEY}", f"bearer  {KEY}", f"Basic {basic}"):
        assert asked(STRANGER, authorization=header) == "key"
    assert shown_key(KEY) == shown_key(f"Digest {KEY}") == ""


@given(st.sampled_from(["GET", "POST", "PUT", "DELETE"]), st.text(max_size=20))
def test_I12_a_stranger_gets_what_is_public_alone(method: str, path: str) -> None:
    found = asked(STRANGER, method, path)
    assert found == "public" if path in PUBLIC_PATHS else isinstance(found, Denied)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_I12_a_foreign_page_changes_nothing_whoever_sends_it(method: str) -> None:
    for caller in (STRANGER, OWNER, LOGGED_IN):
        for headers in ({"origin": "http://node:81"}, {"origin": "null"}, {"sec_fetch_site": "same-site"}):
            for path in ("/v1/downloads", "/login", "/logout"):
                assert isinstance(asked(caller, method, path, **headers), CrossOriginForbidden)


def test_a_login_changes_things_from_the_nodes_own_page_alone() -> None:
    assert asked(LOGGED_IN) == asked(LOGGED_IN, "POST", origin="http://node:8080") == "login"
    assert isinstance(asked(LOGGED_IN, "POST"), Denied)
    assert asked(OWNER, "POST") == "own"
    assert asked(LOGGED_IN, "POST", authorization=f"Bearer {KEY}") == "key"


@given(st.text(max_size=30) | st.text("/\\ab.:?#\r\n", max_size=12))
def test_a_login_leads_to_a_path_of_this_server(text: str) -> None:
    path = own_path(text)
    assert path.startswith("/") and not path.startswith(("//", "/\\"))
    assert path.isascii() and path.isprintable()


def test_a_cookie_holds_for_its_key_and_its_time() -> None:
    value = login_cookie.new_value(KEY, NOW_S)
    assert login_cookie.is_valid(value, KEY, NOW_S)
    assert login_cookie.is_valid(value, KEY, NOW_S + login_cookie.LIFETIME_S - 1)
    assert not login_cookie.is_valid(value, KEY, NOW_S + login_cookie.LIFETIME_S)
    assert not login_cookie.is_valid(value, f"{KEY[:-1]}x", NOW_S)
    assert KEY not in value


@given(st.text(max_size=90))
def test_I12_no_other_text_is_a_login(text: str) -> None:
    until, _, code = login_cookie.new_value(KEY, NOW_S).partition(".")
    for forged in (text, f"{until}.{text}", f"{int(until) + 1}.{code}", f"{text}.{code}"):
        assert forged == f"{until}.{code}" or not login_cookie.is_valid(forged, KEY, NOW_S)
    assert not login_cookie.is_valid(login_cookie.new_value("", NOW_S), "", NOW_S)


@given(st.text(max_size=40))
def test_a_cookie_is_found_among_others(other: str) -> None:
    name = login_cookie.cookie_name(8080)
    clean = other.replace(";", "")
    assert login_cookie.value_in(f"a={clean}; {name}=v.w; b", name) in ("v.w", clean.strip())
    assert login_cookie.value_in(f"x{name}=v", name) == ""


def test_I7_an_address_that_types_wrong_keys_waits() -> None:
    attempts = LoginAttempts()
    logged = [attempts.record_failure("192.0.2.1", 100.0 + n) for n in range(MAX_FAILURES)]
    assert logged == [False] * (MAX_FAILURES - 1) + [True]
    assert attempts.wait_s("192.0.2.1", 110.0) == WINDOW_S - 10.0
    assert attempts.wait_s("192.0.2.2", 110.0) == 0.0
    assert attempts.wait_s("192.0.2.1", 100.0 + WINDOW_S) == 0.0
    assert not attempts.record_failure("192.0.2.1", 100.0 + WINDOW_S)
    assert attempts.wait_s("192.0.2.1", 100.0 + WINDOW_S) == 0.0


def test_I7_all_addresses_of_one_IPv6_network_wait_together() -> None:
    attempts = LoginAttempts()
    for n in range(MAX_FAILURES):
        attempts.record_failure(f"2001:db8::{n:x}", 0.0)
    assert attempts.wait_s("2001:db8::ffff", 1.0) > 0
    assert attempts.wait_s("2001:db8:0:1::1", 1.0) == 0


def test_I7_a_flood_takes_no_memory_and_one_line() -> None:
    attempts = LoginAttempts()
    lines = sum(attempts.record_failure(f"10.{n >> 8}.{n & 255}.1", 0.0) for n in range(3000) for _ in range(12))
    assert lines == 1
    assert len(attempts._failures) == MAX_ADDRESSES
    assert login_attempts.MAX_ADDRESSES < 3000
