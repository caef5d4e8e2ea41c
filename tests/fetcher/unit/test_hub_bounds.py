"""Hubs that never end: each request, each answer and each listing has a bound, and its thread ends with it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from huggingface_hub import set_client_factory
from huggingface_hub.utils._http import default_client_factory

from shoal_common.errors import Expired, HubUnavailable, ShoalError, Unavailable, Unsupported
from shoal_common.host.rate_limiter import RateLimiter
from shoal_common.messages.downloads import DownloadState
from shoal_common.messages.manifest import ManifestFile
from shoal_common.messages.model_shape import GetModelShape
from shoal_common.names import ModelRef
from shoal_common.store.store_paths import StorePaths
from shoal_fetcher.downloads.whole_blob import _read
from shoal_fetcher.hub import client as hub_module
from shoal_fetcher.hub import listing, model_info, range_reader
from shoal_fetcher.hub.client import HubClient, HubSettings
from shoal_fetcher.hub.model_info import ModelShapes
from shoal_fetcher.hub.range_reader import Body, hub_source, make_hub_client, read_range
from shoal_fetcher.partials.blocking import LeafWorkers
from shoal_fetcher.partials.partial_blob import PartialBlob
from shoal_fetcher.progress import Progress
from shoal_fetcher.sources.failure_policy import HUB, SourceHealth
from tests.fetcher.fault_servers import Answer, Asked, reply, serving
from tests.harness.waiting import eventually

REF = ModelRef("org/many")
COMMIT = "c" * 40
REVISION = json.dumps({"id": REF.repo, "sha": COMMIT, "siblings": [], "tags": []}).encode()
PIECE = b" " * (1 << 20)
FILE = ManifestFile(path="f", size_bytes=3)
FOLDER = json.dumps([{"type": "directory", "path": "a", "oid": "b" * 40}]).encode()


@pytest.fixture(autouse=True)
def own_client() -> Iterator[None]:
    """Restore huggingface_hub's client, of which a process has one."""
    yield
    set_client_factory(default_client_factory)


async def no_thread_is_left() -> None:
    async def none() -> bool:
        return not [t for t in threading.enumerate() if "ask_hub" in t.name]

    await eventually(none, "the threads of listings have ended", 5.0)


async def refused(url: str) -> ShoalError:
    """Return the error of listing a model, after which no thread is left."""
    async with make_hub_client() as client:
        with pytest.raises(ShoalError) as caught:
            await HubClient(HubSettings(endpoint=url), client).resolve(REF)
        await no_thread_is_left()
    assert "hub 127.0.0.1" in caught.value.message and "\n" not in caught.value.message
    return caught.value


def hub(tree: Answer) -> Answer:
    """Return a hub that names the commit as it should, and answers for its files with `tree`."""

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        if "/revision/" in asked.path:
            writer.write(reply(200, REVISION))
        else:
            await tree(asked, writer)

    return answer


async def write_for_ever(writer: asyncio.StreamWriter, piece: bytes, pause_s: float = 0.0) -> None:
    """Write a piece until the reader has left."""
    with suppress(ConnectionError):
        while not writer.is_closing():
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)


async def test_pages_that_never_end_are_counted() -> None:
    async def next_page(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(200, FOLDER, link=f'<http://{asked.headers["host"]}{asked.path}>; rel="next"'))

    async with serving(hub(next_page)) as server:
        error = await refused(server.url)
    assert isinstance(error, Unsupported) and f"more than {listing.MAX_REQUESTS} pages" in error.message
    assert len(server.asked) == 1 + listing.MAX_REQUESTS


async def test_one_page_that_never_ends_is_left_at_its_bound() -> None:
    async def endless(_: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n[")
        await write_for_ever(writer, PIECE)

    async with serving(hub(endless)) as server:
        error = await refused(server.url)
    assert isinstance(error, Unsupported) and "more than 8 MiB as one page" in error.message


async def test_large_pages_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "MAX_CALL_BYTES", 3 << 20)

    async def next_page(asked: Asked, writer: asyncio.StreamWriter) -> None:
        link = f'<http://{asked.headers["host"]}{asked.path}>; rel="next"'
        writer.write(reply(200, PIECE + FOLDER, link=link))

    async with serving(hub(next_page)) as server:
        error = await refused(server.url)
    assert isinstance(error, Unsupported) and "more than 3 MiB as one listing" in error.message
    assert len(server.asked) == 1 + 3


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\n\r\n[", b"HTTP/1.1 200 OK\r\nX-Slow: "])
async def test_an_answer_that_trickles_ends_with_its_time(head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "CALL_TIMEOUT_S", 0.4)

    async def trickle(_: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        await write_for_ever(writer, b" ", pause_s=0.02)

    async with serving(hub(trickle)) as server:
        error = await refused(server.url)
    assert isinstance(error, Expired) and "did not answer within" in error.message


async def test_a_redirect_loop_is_followed_five_times() -> None:
    async def around(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(302, location=asked.path))

    async with serving(around) as server:
        error = await refused(server.url)
    assert isinstance(error, HubUnavailable) and "redirects more than 5 times" in error.message
    assert len(server.asked) == range_reader.MAX_REDIRECTS + 1


async def test_the_body_of_a_redirect_is_not_read() -> None:
    """Whoever follows by the library's own rule reads it whole."""
    sent_bytes = 0

    async def endless(asked: Asked, writer: asyncio.StreamWriter) -> None:
        nonlocal sent_bytes
        if asked.path.startswith("/there"):
            writer.write(reply(206, b"abc", content_range="bytes 0-2/3"))
            return
        writer.write(b"HTTP/1.1 302 Found\r\nLocation: /there\r\n\r\n")
        with suppress(ConnectionError):
            for _ in range(64):
                writer.write(PIECE)
                await writer.drain()
                sent_bytes += len(PIECE)
        writer.close()

    async with (
        serving(endless) as server,
        make_hub_client() as client,
        read_range(client, f"{server.url}/file", {}, 0, 3, hub_source(server.url), FILE) as body,
    ):
        assert b"".join([chunk async for chunk in body.chunks]) == b"abc"
    assert sent_bytes < 32 << 20


async def test_a_head_that_trickles_ends_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(range_reader, "HEAD_TIMEOUT_S", 0.3)

    async def trickle(_: Asked, writer: asyncio.StreamWriter) -> None:
        await write_for_ever(writer, b"HTTP/1.1 100 Continue\r\n\r\n", pause_s=0.02)

    async with serving(trickle) as server, make_hub_client() as client:
        with pytest.raises(Unavailable, match=r"hub 127\.0\.0\.1.*did not begin to answer"):
            async with read_range(client, f"{server.url}/file", {}, 0, 3, hub_source(server.url), FILE):
                pass


async def test_a_caller_that_leaves_ends_the_thread_at_once() -> None:
    asked_for_files = asyncio.Event()

    async def silent(_: Asked, writer: asyncio.StreamWriter) -> None:
        asked_for_files.set()
        await write_for_ever(writer, b"", pause_s=0.05)

    async with serving(hub(silent)) as server, make_hub_client() as client:
        resolving = asyncio.create_task(HubClient(HubSettings(endpoint=server.url), client).resolve(REF))
        await asked_for_files.wait()
        resolving.cancel()
        await asyncio.wait({resolving})
        await no_thread_is_left()


async def test_a_hub_that_asks_for_another_try_is_asked_once() -> None:
    """huggingface_hub sleeps and tries again after these."""
    for status in (408, 429, 503):
        async with serving(hub_with(reply(status))) as server:
            assert isinstance(await refused(server.url), HubUnavailable)
        assert len(server.asked) == 2


def hub_with(tree: bytes) -> Answer:
    async def answer(_: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(tree)

    return hub(answer)


async def test_a_web_page_in_place_of_a_listing_is_named() -> None:
    async with serving(hub_with(reply(200, b"<html>login", content_type="text/html"))) as server:
        message = (await refused(server.url)).message
    assert "web page (text/html, 11 B) in place of the listing /api/models/org/many/tree/" in message


async def test_a_compressed_listing_is_refused_unread() -> None:
    async with serving(hub_with(reply(200, b"\x1f\x8b", content_encoding="gzip"))) as server:
        message = (await refused(server.url)).message
        assert "compresses listings unasked" in message and ": gzip, 2 B" in message
    assert {asked.headers["accept-encoding"] for asked in server.asked} == {"identity"}


async def test_I12_a_page_on_another_host_is_read_without_token() -> None:
    async with serving(reply(200, b"[]")) as other:
        page = reply(200, FOLDER, link=f'<http://localhost:{other.port}/more>; rel="next"')
        async with serving(hub_with(page)) as server, make_hub_client() as client:
            await HubClient(HubSettings(endpoint=server.url, token="hf_own"), client).resolve(REF)
    assert {asked.headers["authorization"] for asked in server.asked} == {"Bearer hf_own"}
    assert [asked.headers.get("authorization") for asked in other.asked] == [None]


async def test_cookies_of_a_hub_are_not_kept() -> None:
    answer = reply(206, b"abc", content_range="bytes 0-2/3", set_cookie="a=b")
    async with serving(answer) as server, make_hub_client() as client:
        for _ in range(2):
            async with read_range(client, f"{server.url}/f", {}, 0, 3, hub_source(server.url), FILE):
                pass
        assert not list(client.cookies.jar)
    assert [asked.headers.get("cookie") for asked in server.asked] == [None, None]


async def test_the_headers_of_all_files_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    header = b"{}" + b" " * (1 << 16)
    weights = len(header).to_bytes(8, "little") + header
    monkeypatch.setattr(model_info, "MAX_HEADERS_BYTES", 5 * len(weights))
    names = [f"model-{i}.safetensors" for i in range(9)]
    sizes = {**dict.fromkeys(names, len(weights)), "config.json": 2}
    files = [{"type": "file", "path": p, "size": s, "oid": "b" * 40} for p, s in sizes.items()]

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        if "/resolve/" not in asked.path:
            writer.write(reply(200, json.dumps(files).encode()))
            return
        content = b"{}" if asked.path.endswith("config.json") else weights
        first, last = map(int, asked.headers["range"].removeprefix("bytes=").split("-"))
        part = content[first : last + 1]
        writer.write(reply(206, part, content_range=f"bytes {first}-{last}/{len(content)}"))

    async with serving(hub(answer)) as server, make_hub_client() as client:
        shapes = ModelShapes(HubClient(HubSettings(endpoint=server.url), client), RateLimiter())
        with pytest.raises(Unsupported, match="headers of org/many have more than"):
            await shapes.shape(GetModelShape(model=REF.repo))


def test_a_listing_that_is_allowed_fits_into_its_bounds() -> None:
    """4,000 files, each in folders of its own, at the hub's 1,000 entries a page and 500 bytes an entry."""
    entries = 4 * hub_module.MAX_FILES
    assert entries / 1000 < listing.MAX_REQUESTS
    assert entries * 500 < listing.MAX_CALL_BYTES and listing.MAX_ANSWER_BYTES > 1000 * 500


async def test_a_small_blob_that_trickles_has_no_progress(tmp_path: Path) -> None:
    class Impatient(Progress):
        chunks = 0

        def check_stalled(self, path: str, last_error: ShoalError | None) -> None:
            self.chunks += 1
            if self.chunks == 3:
                raise Unavailable(f"no progress on {path}")

    @asynccontextmanager
    async def trickle(start: int, _: int) -> AsyncIterator[Body]:
        async def chunks() -> AsyncIterator[bytes]:
            while True:
                yield b"x"

        yield Body(start, chunks())

    class Site(msgspec.Struct):
        partial: PartialBlob

        def partial_blob(self, _: ManifestFile) -> PartialBlob:
            return self.partial

    layout, file = StorePaths(tmp_path), ManifestFile(path="config.json", size_bytes=1 << 20, sha256="a" * 64)
    layout.partial(file.blob).mkdir(parents=True)
    (layout.partial(file.blob) / "data").touch()
    async with LeafWorkers() as workers:
        site: Any = Site(PartialBlob(layout, workers, file.blob, file.size_bytes))
        state = DownloadState(node="a", model=REF.repo, phase="fetching")
        progress = Impatient(cast(Any, None), state, cast(Any, None), is_published=False)
        with pytest.raises(Unavailable, match=r"no progress on config\.json"):
            await asyncio.wait_for(_read(HUB, site, file, trickle, SourceHealth(), progress), 10)
