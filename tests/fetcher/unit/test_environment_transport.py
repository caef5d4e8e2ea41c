"""Proxies and certificates of the environment: named when the hub is asked, never before; SOCKS works."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import certifi
import pytest

from shoal_common.errors import Refused
from shoal_common.messages.manifest import ManifestFile
from shoal_fetcher.hub.range_reader import hub_source, make_hub_client, read_range
from tests.fetcher.fault_servers import reply, serving

FILE = ManifestFile(path="model.safetensors", size_bytes=3)
ANSWER = reply(206, b"abc", content_range="bytes 0-2/3")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy of the machine, and 127.0.0.1 through that of a test."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith("SSL"):
            monkeypatch.delenv(name)


async def read(url: str) -> bytes:
    async with make_hub_client() as client, read_range(client, url, {}, 0, 3, hub_source(url), FILE) as body:
        return b"".join([chunk async for chunk in body.chunks])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SSL_CERT_FILE", "/gone/ca.pem"),
        ("ALL_PROXY", "http://proxy:99999"),
        ("HTTPS_PROXY", "http://proxy:http"),
        ("https_proxy", "ftp://proxy"),
        ("HTTP_PROXY", "socks4://proxy:1080"),
        ("all_proxy", "http://me:hunter2@[proxy"),
        ("ALL_PROXY", "me:hunter2@proxy:http"),
    ],
)
async def test_an_unusable_variable_is_named_when_the_hub_is_asked(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    async with make_hub_client():
        pass  # starting asks nothing
    async with serving(ANSWER) as server:
        with pytest.raises(Refused, match=f"the hub cannot be asked: {name}=") as caught:
            await read(server.url)
        assert server.asked == []
    assert "hunter2" not in caught.value.message


async def test_a_certificate_file_that_holds_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ca.pem").write_text("none")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    with pytest.raises(Refused, match=r"SSL_CERT_FILE=.*ca\.pem"):
        await read("http://127.0.0.1:1")


async def test_a_key_log_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", certifi.where())
    monkeypatch.setenv("SSLKEYLOGFILE", "/gone/keys.log")
    with pytest.raises(Refused, match=r"SSLKEYLOGFILE=/gone/keys\.log"):
        await read("http://127.0.0.1:1")


async def test_usable_variables_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys.log"))
    async with serving(ANSWER) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        assert await read("http://hub.invalid/f") == b"abc"
        assert proxy.asked[0].path == "http://hub.invalid/f"


@asynccontextmanager
async def socks_server(port: int, asked: list[bytes]) -> AsyncIterator[str]:
    """A SOCKS5 server without authentication (RFC 1928): all that it is asked for is at `port`."""

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            _version, methods = await reader.readexactly(2)
            await reader.readexactly(methods)
            writer.write(b"\x05\x00")
            _version, _connect, _, kind = await reader.readexactly(4)
            assert kind == 3, "by name: the server resolves it"
            asked.append(await reader.readexactly((await reader.readexactly(1))[0]))
            await reader.readexactly(2)
            to_hub, from_hub = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"\x05\x00\x00\x01" + bytes(6))
            await asyncio.gather(pipe(reader, from_hub), pipe(to_hub, writer))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@pytest.mark.parametrize("scheme", ["socks5h", "socks5"])
async def test_a_socks_proxy_carries_what_the_hub_sends(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []
    async with serving(ANSWER) as hub, socks_server(hub.port, asked) as address:
        monkeypatch.setenv("ALL_PROXY", f"{scheme}://{address}")
        assert await read("http://hub.invalid/f") == b"abc"
    assert asked == [b"hub.invalid"]
