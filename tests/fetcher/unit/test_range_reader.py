"""Reading a range from servers of every kind, and how their failures are mapped."""

from __future__ import annotations

import asyncio
import inspect

import httpx2
import pytest

from shoal_common.errors import Corrupt, Denied, HubUnavailable, InternalError, NotFound, ShoalError
from shoal_common.messages.manifest import ManifestFile
from shoal_fetcher.errors import RateLimited
from shoal_fetcher.hub.range_reader import (
    HTTP_ERRORS,
    MAX_LINKS,
    hub_source,
    make_hub_client,
    map_http_error,
    read_range,
)
from tests.fetcher.fault_servers import Answer, Asked, reply, serving

HUB = hub_source("https://hub.example")


async def read(
    url: str, start: int, end: int, client: httpx2.AsyncClient | None = None, size_bytes: int = 9, **headers: str
) -> bytes:
    """Return the bytes of a range, after the offset of the first one."""
    file = ManifestFile(path="model.safetensors", size_bytes=size_bytes)
    async with client or make_hub_client() as c, read_range(c, url, headers, start, end, HUB, file) as body:
        return b"%d:" % body.offset + b"".join([chunk async for chunk in body.chunks])


async def test_a_range_is_asked_for_unencoded_and_read() -> None:
    async with serving(reply(206, b"cde", content_range="bytes 2-4/9")) as server:
        assert await read(server.url, 2, 5) == b"2:cde"
    assert server.asked[0].headers["range"] == "bytes=2-4"
    assert server.asked[0].headers["accept-encoding"] == "identity"


async def test_a_server_that_answers_a_range_with_200_is_read_from_0() -> None:
    async with serving(reply(200, b"abcdefghi")) as server:
        assert await read(server.url, 2, 5) == b"0:abcdefghi"


@pytest.mark.parametrize("answered", ["bytes 0-2/9", "bytes */9", "items 2-4/9", "", "bytes " + "9" * 5000 + "-4/9"])
async def test_a_range_other_than_requested_is_refused_unread(answered: str) -> None:
    async with serving(reply(206, b"abc", content_range=answered)) as server:
        with pytest.raises(Corrupt, match="another range"):
            await read(server.url, 2, 5)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *[(401, Denied), (403, Denied), (404, NotFound), (416, Corrupt)],
        *[
            (500, HubUnavailable),
            (503, HubUnavailable),
            (204, InternalError),
            (400, InternalError),
            (418, InternalError),
        ],
    ],
)
async def test_each_status_has_its_error_and_names_the_source(status: int, kind: type[ShoalError]) -> None:
    async with serving(reply(status)) as server:
        with pytest.raises(ShoalError, match=r"hub\.example") as caught:
            await read(server.url, 0, 5)
    assert type(caught.value) is kind


LINK = "/cdn/blob?X-Amz-Signature=abc"


def redirecting(*answers: bytes, to: str = "") -> Answer:
    """Answer like a hub that redirects to a content network, which gives these answers, the last one for ever."""
    given = list(answers)

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        if asked.path == LINK:
            writer.write(given.pop(0) if len(given) > 1 else given[0])
        else:
            writer.write(reply(302, location=f"{to}{LINK}"))

    return answer


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
async def test_a_refused_link_is_asked_for_again_at_the_hub(status: int) -> None:
    whole = reply(206, b"cde", content_range="bytes 2-4/9")
    async with serving(redirecting(reply(status), whole)) as server:
        assert await read(server.url, 2, 5) == b"2:cde"
    assert [asked.path for asked in server.asked] == ["/", LINK, "/", LINK]


async def test_a_link_refused_for_ever_is_no_denial() -> None:
    async with serving(redirecting(reply(403, x_error_code="GatedRepo"))) as other:
        to = f"http://localhost:{other.port}"
        async with serving(redirecting(b"", to=to)) as server:
            with pytest.raises(
                HubUnavailable, match=r"localhost.*refused the link to model.safetensors.*403"
            ) as caught:
                await read(server.url, 2, 5)
    assert len(other.asked) == MAX_LINKS
    assert "Signature" not in caught.value.message and "HF_TOKEN" not in caught.value.message


@pytest.mark.parametrize("new", ["/new/resolve/c/f", "/api/resolve-cache/models/new/c/f"])
async def test_a_renamed_model_that_the_hub_refuses_is_denied(new: str) -> None:
    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(401) if asked.path == new else reply(307, location=new))

    async with serving(answer) as server:
        with pytest.raises(Denied, match="HF_TOKEN"):
            await read(server.url, 2, 5)
    assert len(server.asked) == 2


async def test_a_compressed_file_is_refused_by_path_encoding_and_size() -> None:
    async with serving(reply(200, b"\x1f\x8b" * 600, content_encoding="gzip")) as server:
        with pytest.raises(HubUnavailable, match=r"model\.safetensors: gzip, 1\.2 kB.*proxy"):
            await read(server.url, 2, 5)


async def test_a_web_page_in_place_of_a_file_is_refused() -> None:
    page = b"<html>" + b"login" * 300
    async with serving(reply(200, page, content_type="text/html; charset=utf-8")) as server:
        with pytest.raises(HubUnavailable, match=r"text/html, 1\.5 kB.*in place of model\.safetensors \(9 B\)"):
            await read(server.url, 2, 5)
        assert await read(server.url, 0, 5, size_bytes=len(page)) == b"0:" + page, "it may be what the model has"


@pytest.mark.parametrize(
    "answer", [reply(200, b"abc"), reply(206, b"cde", content_range="bytes 2-4/8")], ids=["whole", "range"]
)
async def test_a_file_of_another_size_than_listed_is_refused_unread(answer: bytes) -> None:
    async with serving(answer) as server:
        with pytest.raises(Corrupt, match=r"bytes of model\.safetensors instead of the 9 that it lists"):
            await read(server.url, 2, 5)


async def test_an_authorization_error_names_the_credential_to_set() -> None:
    async with serving(reply(401)) as server:
        with pytest.raises(Denied, match="HF_TOKEN"):
            await read(server.url, 0, 5)
    async with serving(reply(403, x_error_code="GatedRepo")) as server:
        with pytest.raises(Denied, match=r"gated.*accept its terms"):
            await read(server.url, 0, 5)


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({"retry_after": "12"}, 12),
        ({"ratelimit": '"resolvers";r=0;t=7'}, 7),
        ({"retry_after": "3", "ratelimit": '"api";r=0;t=9'}, 3),
        ({"retry_after": "Fri, 31 Dec 1999 23:59:59 GMT"}, 5),
        ({"retry_after": "²"}, 5),
        ({"retry_after": "9" * 400}, 900),
        ({}, 5),
    ],
)
async def test_a_rate_limit_names_when_to_retry(headers: dict[str, str], wait_s: float) -> None:
    async with serving(reply(429, b"", **headers)) as server:
        with pytest.raises(RateLimited) as caught:
            await read(server.url, 0, 5)
    assert caught.value.retry_after_s == wait_s


async def test_I7_a_source_that_stalls_times_out() -> None:
    forever = asyncio.Event()

    async def stall(_: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(206, b"abcde", content_range="bytes 0-4/9")[:-2])
        await writer.drain()
        await forever.wait()

    async with serving(stall) as server:
        with pytest.raises(HubUnavailable, match="sent nothing"):
            await read(server.url, 0, 5, make_hub_client(silence_timeout_s=0.2))
        forever.set()


async def test_a_body_that_breaks_off_is_a_lost_source_and_no_file() -> None:
    async def breaks(_: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(206, b"abcde", content_range="bytes 0-4/9")[:-2])
        writer.close()

    async with serving(breaks) as server:
        with pytest.raises(HubUnavailable, match="broke off"):
            await read(server.url, 0, 5)


async def test_a_refused_connection_is_a_source_that_is_down() -> None:
    async with serving(b"") as server:
        pass
    with pytest.raises(HubUnavailable, match="is unreachable"):
        await read(server.url, 0, 5)


async def test_I12_the_token_does_not_follow_a_foreign_redirect() -> None:
    async with serving(reply(206, b"abc", content_range="bytes 0-2/9")) as other:
        async with serving(reply(302, location=f"http://localhost:{other.port}/x")) as server:
            assert await read(server.url, 0, 3, Authorization="Bearer secret") == b"0:abc"
        assert server.asked[0].headers["authorization"] == "Bearer secret"
        assert "authorization" not in other.asked[0].headers


def test_I12_a_password_in_the_hubs_url_is_in_no_message() -> None:
    assert hub_source("https://me:hunter2@hub.example/base").name == "hub hub.example/base"


# Raised when the client library is misused, which is our bug and must look like one.
OURS_TO_BLAME = {
    "StreamError",
    "StreamConsumed",
    "StreamClosed",
    "ResponseNotRead",
    "RequestNotRead",
    "CookieConflict",
    "HTTPXDeprecationWarning",
}


def test_every_exception_of_httpx2_is_mapped_or_ours_to_blame() -> None:
    classes = [c for _, c in inspect.getmembers(httpx2, inspect.isclass) if issubclass(c, Exception)]
    unmapped = {c.__name__ for c in classes if not issubclass(c, HTTP_ERRORS)}
    assert unmapped - OURS_TO_BLAME == set()
    for kind in classes:
        if issubclass(kind, HTTP_ERRORS):
            error = map_http_error(kind.__new__(kind), HUB)
            assert type(error) is HubUnavailable and "hub.example" in error.message
