"""Who may call a running gateway (I12): its key, a login, this user on this machine; nobody else, on any route."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest

from shoal_common.identity.api_key import read_api_key, replace_api_key
from shoal_common.identity.certificates import node_host
from shoal_common.identity.tls import client_context
from shoal_gateway.access.rules import PUBLIC_PATHS
from shoal_gateway.app import ROUTES
from tests.gateway.fake_cluster import error_of
from tests.gateway.running_gateway import NODE, RunningGateway, running_gateway
from tests.harness.member import make_member, member_nats
from tests.harness.nats import NatsServer
from tests.harness.networks import Machine, machines, relayed, wire
from tests.harness.other_user import OTHER_UID, Request, statuses
from tests.harness.waiting import eventually

ALL_ROUTES: list[Request] = [
    (method, re.sub(r"\{[^}]*\}", "x", route.path))
    for route in ROUTES
    for method in sorted((route.methods or set()) - {"HEAD"})
    if route.path not in PUBLIC_PATHS
]
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells whose a connection is")
PAGE = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
WITHOUT_TLS = 'tls = "off"'
ELSEWHERE = {"X-Forwarded-For": "192.0.2.1"}


@pytest.fixture
def here(tmp_path: Path, own_nats: NatsServer) -> Iterator[RunningGateway]:
    """A gateway on loopback with a home of its own."""
    with running_gateway(tmp_path / "home", own_nats) as gateway:
        yield gateway


def home_of(gateway: RunningGateway) -> Path:
    return gateway.log.parent


def client(gateway: RunningGateway) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url=gateway.url, trust_env=False)


def port_of(gateway: RunningGateway) -> int:
    return urlsplit(gateway.url).port or 0


def test_I12_another_user_of_the_machine_needs_the_key(gateway: RunningGateway) -> None:
    assert len(ALL_ROUTES) > 30
    refused = statuses("127.0.0.1", port_of(gateway), ALL_ROUTES, uid=OTHER_UID)
    assert set(refused.values()) == {401}, refused
    public = [("GET", "/health"), ("GET", "/login")]
    assert set(statuses("127.0.0.1", port_of(gateway), public, uid=OTHER_UID).values()) == {200}
    with_key = statuses("127.0.0.1", port_of(gateway), [("GET", "/v1/status")], gateway.key, uid=OTHER_UID)
    assert set(with_key.values()) == {200}


@ON_LINUX
def test_the_owner_of_the_node_needs_no_key(gateway: RunningGateway) -> None:
    paths = [("GET", "/"), ("GET", "/v1/status"), ("GET", "/v1/storage"), ("DELETE", "/v1/models/org/x")]
    served = statuses("127.0.0.1", port_of(gateway), paths)
    assert 401 not in served.values() and served["GET", "/v1/status"] == 200


@pytest.mark.parametrize(
    "headers",
    [ELSEWHERE, {"Forwarded": "for=192.0.2.1"}, {"Via": "1.1 proxy"}, {"X-Real-IP": "192.0.2.1"}],
    ids=lambda h: str(*h),
)
def test_I12_what_a_proxy_forwards_needs_the_key(gateway: RunningGateway, headers: dict[str, str]) -> None:
    assert set(statuses("127.0.0.1", port_of(gateway), ALL_ROUTES, headers).values()) == {401}
    with_key = statuses("127.0.0.1", port_of(gateway), [("GET", "/v1/status")], {**headers, **gateway.key})
    assert set(with_key.values()) == {200}


@contextmanager
def member_gateway(directory: Path, settings: str = "", within: Machine | None = None) -> Iterator[RunningGateway]:
    """Run the gateway of a member of a cluster beyond loopback, on this machine or on another one."""
    identity = make_member(directory / "home", NODE, "127.0.0.1")
    with ExitStack() as stack:
        nats = stack.enter_context(member_nats(directory / "nats", identity))
        if within is not None:
            stack.enter_context(relayed(within, int(nats.url.rpartition(":")[2])))
        yield stack.enter_context(
            running_gateway(
                directory / "home",
                nats,
                within=() if within is None else within.within,
                settings=settings,
                SHOAL_BIND="0.0.0.0",
            )
        )


def test_I12_another_machine_needs_the_key_on_every_route(tmp_path: Path) -> None:
    with machines("a", "b") as (a, b):
        wire("wire", a, ("10.213.78.1/24",), b, ("10.213.78.2/24",))
        with member_gateway(tmp_path, WITHOUT_TLS, a) as gateway:
            port = port_of(gateway)
            refused = statuses("10.213.78.1", port, [*ALL_ROUTES, ("GET", "/health")], within=b.within)
            assert refused.pop(("GET", "/health")) == 200
            assert set(refused.values()) == {401}, refused
            status = [("GET", "/v1/status")]
            assert set(statuses("10.213.78.1", port, status, gateway.key, within=b.within).values()) == {200}
            # Over the network a process of this user is a stranger too: its address is not loopback's.
            assert set(statuses("10.213.78.1", port, status, within=a.within).values()) == {401}
            assert set(statuses("127.0.0.1", port, status, within=a.within).values()) == {200}
            assert "no TLS beyond loopback" in gateway.log.read_text()


async def test_I12_a_name_that_leads_to_loopback_is_not_the_owner(tmp_path: Path) -> None:
    with member_gateway(tmp_path, WITHOUT_TLS) as gateway:
        async with client(gateway) as http:
            assert (await http.get("/v1/status")).status_code == 200
            # DNS rebinding: the browser of the owner, with a page of evil.example that has become 127.0.0.1.
            page = {"Host": f"evil.example:{port_of(gateway)}", "Origin": f"http://evil.example:{port_of(gateway)}"}
            for method, path in ALL_ROUTES:
                assert (await http.request(method, path, headers=page)).status_code == 401, path


async def test_I12_every_form_of_the_key_opens_and_no_other(here: RunningGateway) -> None:
    key = read_api_key(home_of(here))
    async with client(here) as http:
        for credential in ({"Authorization": f"Bearer {key}"}, {"Authorization": f"bearer  {key}"}):
            assert (await http.get("/v1/status", headers=ELSEWHERE | credential)).status_code == 200
        assert (await http.get("/v1/status", headers=ELSEWHERE, auth=("anyone", key))).status_code == 200
        for wrong in ("x", key[:-1], f"{key}x", key.upper()):
            answer = await http.get("/v1/status", headers=ELSEWHERE | {"Authorization": f"Bearer {wrong}"})
            error = error_of(answer, 401)
            assert error["code"] == "denied" and "shoal key" in error["message"]
            assert answer.headers["www-authenticate"].startswith("Bearer")  # with Basic, browsers ask by themselves


async def log_in(http: httpx2.AsyncClient, key: str, target: str = "/", **headers: str) -> httpx2.Response:
    form = {"key": key, "next": target}
    return await http.post("/login", data=form, headers={**ELSEWHERE, "Origin": str(http.base_url), **headers})


async def test_a_browser_gets_a_page_logs_in_and_out(here: RunningGateway) -> None:
    key, browser = read_api_key(home_of(here)), ELSEWHERE | PAGE
    async with client(here) as http:
        page = await http.get("/", headers=browser)
        assert page.status_code == 401 and page.headers["content-type"].startswith("text/html")
        assert "basic" not in page.headers["www-authenticate"].lower()
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert page.headers["referrer-policy"] == "same-origin", "else a browser's form has the origin null"
        for outside in ("src=", "@import", "url(", "http:", "https:", "<script", str(home_of(here))):
            assert outside not in page.text
        asked = await http.get('/v1/models?a=1&b="x', headers=browser)
        assert 'name="next" value="/v1/models?a=1&amp;b=%22x"' in asked.text
        assert error_of(await http.get("/", headers=ELSEWHERE), 401)

        done = await log_in(http, f" {key}\n", "/v1/models")
        assert (done.status_code, done.headers["location"]) == (303, "/v1/models")
        attributes = done.headers["set-cookie"].split("; ")[1:]
        assert {"HttpOnly", "SameSite=Strict", "Path=/", "Max-Age=2592000"} == set(attributes)
        assert (await http.get("/v1/status", headers=browser)).status_code == 200
        assert '<button id="logout">' in (await http.get("/", headers=browser)).text

        out = await http.post("/logout", headers={**ELSEWHERE, "Origin": here.url})
        assert out.status_code == 303 and "Max-Age=0" in out.headers["set-cookie"]
        assert (await http.get("/v1/status", headers=browser)).status_code == 401
        assert '<button id="logout" hidden>' in (await http.get("/")).text


async def test_I12_a_login_lets_no_other_page_change_anything(here: RunningGateway) -> None:
    async with client(here) as http:
        assert (await log_in(http, read_api_key(home_of(here)))).status_code == 303

        async def change(**headers: str) -> httpx2.Response:
            return await http.post("/v1/storage/verify", json={"model": "org/x"}, headers={**ELSEWHERE, **headers})

        assert (await change(Origin=here.url)).status_code == 503  # no storage
        for origin in ("http://127.0.0.1:9", "https://evil.example", "null"):
            assert error_of(await change(Origin=origin), 403)["code"] == "cross_origin"
            assert error_of(await log_in(http, "x", Origin=origin), 403)["code"] == "cross_origin"
        error_of(await change(), 401)


async def test_I7_a_long_form_is_refused_before_it_has_arrived(here: RunningGateway) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(here))
    writer.write(b"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 8000000\r\n\r\n" + b"k" * 20_000)
    async with asyncio.timeout(30):
        assert b" 413 " in await reader.readline()
    writer.close()


@pytest.mark.parametrize("target", ["//evil.example/", "https://evil.example", "/\\evil.example", "/\r\nX: y", ""])
async def test_a_login_leads_nowhere_else(here: RunningGateway, target: str) -> None:
    async with client(here) as http:
        done = await log_in(http, read_api_key(home_of(here)), target)
        assert (done.status_code, done.headers["location"]) == (303, "/")


async def test_I12_wrong_keys_are_limited_and_logged_once(here: RunningGateway) -> None:
    async with client(here) as http:
        answers = [(await log_in(http, f"shoal-{n}")).status_code for n in range(30)]
        assert answers == [401] * 10 + [429] * 20
        refused = await log_in(http, read_api_key(home_of(here)))
        assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
        assert (await http.get("/v1/status", headers=ELSEWHERE | here.key)).status_code == 200
    assert here.log.read_text().count("too many logins") == 1


async def test_a_new_key_ends_the_old_one_and_its_logins(here: RunningGateway) -> None:
    old = here.key
    async with client(here) as http:
        assert (await log_in(http, read_api_key(home_of(here)))).status_code == 303
        new = replace_api_key(home_of(here))

        async def refused() -> bool:
            return (await http.get("/v1/status", headers=ELSEWHERE | old)).status_code == 401

        await eventually(refused, "the old key is refused")
        assert (await http.get("/v1/status", headers=ELSEWHERE)).status_code == 401
        with_new = await http.get("/v1/status", headers=ELSEWHERE | {"Authorization": f"Bearer {new}"})
        assert with_new.status_code == 200
    assert new not in here.log.read_text()


async def test_I12_beyond_loopback_the_gateway_speaks_TLS(tmp_path: Path) -> None:
    with member_gateway(tmp_path) as gateway:
        url = f"https://127.0.0.1:{port_of(gateway)}"
        trusted = client_context((home_of(gateway) / "identity" / "ca.crt").read_bytes())
        async with httpx2.AsyncClient(base_url=url, trust_env=False, verify=trusted) as http:
            assert (await http.get("/v1/status")).status_code == 200
            error_of(await http.get("/v1/status", headers=ELSEWHERE), 401)
            done = await log_in(http, read_api_key(home_of(gateway)))
            assert done.status_code == 303 and "Secure" in done.headers["set-cookie"].split("; ")
        for name, is_right in ((node_host(NODE), True), (node_host("b"), False), ("127.0.0.2", False)):
            async with httpx2.AsyncClient(base_url=url, trust_env=False, verify=trusted) as http:
                asking = http.get("/health", extensions={"sni_hostname": name})
                if is_right:
                    assert (await asking).status_code == 200
                else:
                    with pytest.raises(httpx2.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                        await asking
        async with client(gateway) as http:
            with pytest.raises(httpx2.TransportError):
                await http.get("/v1/status")


def test_a_gateway_with_a_damaged_key_does_not_start(tmp_path: Path, own_nats: NatsServer) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "api.key").write_text("")
    with (
        pytest.raises(AssertionError, match=r"api\.key does not hold a key.*shoal key --new"),
        running_gateway(tmp_path / "home", own_nats),
    ):
        pass
