"""Parsers of the services and of the CLI: the hub, peers, stages, API bodies, events, libraries, sockets."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import msgspec

from shoal_cli.api.client import iter_lines
from shoal_cli.api.event_stream import parse_events
from shoal_cli.node.control import ControlReply, ControlRequest
from shoal_cli.node.logs.nats_format import translate
from shoal_common.errors import BadMessage, Corrupt, ShoalError
from shoal_common.messages import decode
from shoal_common.messages.downloads import HaveMessage
from shoal_common.messages.manifest import Manifest, ManifestFile
from shoal_common.names import ModelRef
from shoal_common.store.bitmap import leaf_count
from shoal_common.store.leaf_set import from_bitmap
from shoal_fetcher.hub.client import HubClient, HubSettings
from shoal_fetcher.hub.range_reader import hub_source, read_range, retry_after_s
from shoal_fetcher.sources.leaf_selection import stage_leaves
from shoal_fetcher.swarm.http_client import _Connection, _ConnectionLost, parse_address, raise_for_status
from shoal_fetcher.swarm.sinks import BytesSink
from shoal_fileserver.http.ranges import ByteRange, parse_range
from shoal_gateway.events.sse import parse_event, parse_query, to_sse
from shoal_gateway.generation.openai import parse_request, to_chat_messages
from shoal_inference.host_facts.memory_pressure import parse_psi
from shoal_inference.stage.errors import BadFrame, HandshakeRefused
from shoal_inference.stage.ring import frames, handshake
from shoal_storage.admission.manifest_check import check_manifest
from shoal_storage.leases.lease_files import LeaseFile
from shoal_storage.ledger.library_model import FileStat
from shoal_storage.libraries.recognize import DirEntry, LibraryListing, recognize
from tests.fuzz.parser_under_test import JSON_PIECES, Parser, json_or_none, text_of

_COMMIT = "c" * 40
_PLACE = handshake.RingPlace(
    instance="i", epoch=1, rank=1, stages=3, successor_secret=b"s" * 32, predecessor_secret=b"s" * 32
)
_FILE = ManifestFile(path="f", size_bytes=100)
_NONCE = bytes(handshake.NONCE_BYTES)


def _listing(data: bytes) -> None:
    """The first line is the revision's answer, the second the Link header, the rest the page."""
    revision, _, rest = data.partition(b"\n")
    link, _, page = rest.partition(b"\n")
    headers = [(b"link", link.replace(b"\r", b""))] if link else []

    def answer(request: httpx2.Request) -> httpx2.Response:
        if "/revision/" in request.url.path:
            return httpx2.Response(200, content=revision)
        first = "cursor" not in str(request.url)
        return httpx2.Response(200, headers=headers if first else [], content=page)

    async def resolve() -> Manifest:
        async with httpx2.AsyncClient(transport=httpx2.MockTransport(answer)) as client:
            return await HubClient(HubSettings("http://hub"), client).resolve(ModelRef("org/name"))

    manifest = asyncio.run(resolve())
    check_manifest(msgspec.structs.replace(manifest, files=[f for f in manifest.files if f.sha256]))


def _range_head(data: bytes) -> None:
    """What the hub answers to a range: lines of headers, an empty line, a body."""
    head, _, body = data.partition(b"\n\n")
    headers = [
        (name, value.strip()) for name, colon, value in (h.partition(b":") for h in head.split(b"\n")) if colon
    ]
    status = 206 if len(data) % 3 else (200, 302, 401, 403, 404, 416, 429, 503)[len(data) // 3 % 8]

    async def read() -> None:
        answered = httpx2.MockTransport(
            lambda _: httpx2.Response(status, headers=headers, stream=httpx2.ByteStream(body))
        )
        async with (
            httpx2.AsyncClient(transport=answered) as client,
            read_range(client, "http://hub/f", {}, 0, 100, hub_source("http://hub"), _FILE) as reading,
        ):
            async for _ in reading.chunks:
                pass

    headers = [(bytes(n), bytes(v)) for n, v in headers if n.isascii() and n.replace(b"-", b"a").isalnum()]
    retry_after_s({n.decode().lower(): v.decode("latin-1") for n, v in headers})
    asyncio.run(read())


def _peer_head(data: bytes) -> None:
    async def receive() -> None:
        connection = _Connection(1.0)
        connection._done = asyncio.get_running_loop().create_future()
        connection._sink = BytesSink(0, 1000)
        at = 0
        while at < len(data) and not connection._done.done():
            buffer = connection.get_buffer(-1)
            count = min(len(buffer), len(data) - at)
            assert count, "nothing can be received any more"
            buffer[:count] = data[at : at + count]
            at += count
            connection.buffer_updated(count)
        connection.eof_received()
        raise_for_status(await connection._done, "b")

    asyncio.run(receive())


def _have(data: bytes) -> None:
    have = decode(data, HaveMessage)
    for bitmap in (have.available_leaves, have.wanted_leaves):
        assert from_bitmap(bitmap).bit_length() <= 8 * len(bitmap)


def _stage_leaves(data: bytes) -> None:
    config, _, header = data.partition(b"\n")
    given = json_or_none(config)
    file = ManifestFile(path="model.safetensors", size_bytes=64 << 20, sha256="a" * 64)
    if isinstance(given, dict):
        leaves = stage_leaves(given, {file.blob: bytes(8) + header}, [file], [[0, 2]])
        assert all(0 <= of_blob < 1 << leaf_count(file.size_bytes) for of_blob in leaves.values())


def _range(data: bytes) -> None:
    for size_bytes in (0, 1, 1000, 1 << 62):
        part = parse_range(text_of(data), size_bytes)
        assert not isinstance(part, ByteRange) or 0 <= part.start < part.end <= size_bytes


def _frame(data: bytes) -> None:
    if len(data) < frames.HEADER_BYTES:
        return
    header = frames.decode_header(data[: frames.HEADER_BYTES], max_payload_bytes=1 << 20)
    assert frames.encode_header(header) == data[: frames.HEADER_BYTES]


def _handshake(data: bytes) -> None:
    calls = (
        lambda: handshake.read_challenge(data),
        lambda: handshake.check_hello(_PLACE, _NONCE, data),
        lambda: handshake.check_welcome(_PLACE, _NONCE, _NONCE, data),
    )
    for call in calls:
        try:
            call()
        except HandshakeRefused as e:
            assert len(str(e)) < 1000


def _chat(data: bytes) -> None:
    request = parse_request(data)
    assert all(isinstance(stop, str) for stop in request.stops)
    to_chat_messages(request)


def _event_query(data: bytes) -> None:
    fields = text_of(data).split("\n")
    names = ("after", "since", "last", "follow", "service", "node", "event")
    parse_query({n: v for n, v in zip(names, fields, strict=False) if v}, fields[-1])


def _event(data: bytes) -> None:
    frame = to_sse(parse_event("shoal.v1.evt.fetcher.a.download_started", data, 7, 1.0))
    events = list(parse_events(iter_lines(httpx2.Response(200, content=frame))))
    assert len(events) == 1 and events[0].cursor == "7" and json.loads(events[0].data)["node"] == "a"


def _sse(data: bytes) -> None:
    for event in parse_events(iter_lines(httpx2.Response(200, content=data))):
        assert "\n" not in event.name


def _log_line(data: bytes) -> None:
    line = translate(data, "a", 1.0)
    assert line.count(b"\n") <= 1
    parse_psi(text_of(data))


def _control(data: bytes) -> None:
    for kind in (ControlRequest, ControlReply, LeaseFile):
        with suppress(BadMessage):
            decode(data, kind)


def _manifest(data: bytes) -> None:
    manifest = decode(data, Manifest)
    check_manifest(manifest)
    assert manifest.size_bytes >= 0


def _library(data: bytes) -> None:
    """Lines `path kind target`; a file's text is what stands after `=`."""
    entries: dict[str, DirEntry] = {}
    texts: dict[str, bytes] = {}
    kinds: Any = ("file", "directory", "link", "other")
    for line in data.split(b"\n")[:200]:
        path, _, rest = line.partition(b" ")
        kind, _, text = rest.partition(b" ")
        name = path.decode(errors="surrogateescape")
        if not name or name.startswith("/") or "//" in name or name.endswith("/"):
            continue
        entries[name] = DirEntry(
            kinds[len(kind) % 4], FileStat(len(text), 1, 1), text.decode(errors="surrogateescape")
        )
        texts[name] = text
    found = recognize(LibraryListing("/library", entries, texts))
    for candidate in found.candidates:
        ModelRef.parse(candidate.repo)
        assert all(".." not in Path(f.path).parts for f in candidate.files)


PARSERS = (
    Parser(
        "hub_listing",
        _listing,
        (b'"lfs":{', b'"path":"', b'"type":"file"', b'>; rel="next"', b"<http://hub/x?cursor=1", *JSON_PIECES),
    ),
    Parser(
        "hub_head",
        _range_head,
        (
            b"content-range: bytes 0-",
            b"/",
            b"*",
            b"location: http://hub/",
            b"retry-after: ",
            b"ratelimit: ",
            b"x-error-code: GatedRepo",
        ),
    ),
    Parser(
        "peer_head",
        _peer_head,
        (
            b"HTTP/1.1 200 OK\r\n",
            b"Content-Length: ",
            b"\r\n\r\n",
            b"Retry-After: ",
            b"Transfer-Encoding: chunked\r\n",
        ),
        (ShoalError, _ConnectionLost),
    ),
    Parser("peer_address", lambda data: parse_address(text_of(data)), (b"[::1]", b":8080", b"127.0.0.1", b"%eth0")),
    Parser("have", _have, JSON_PIECES),
    Parser("stage_leaves", _stage_leaves, (b"\n", b'"data_offsets":[', b"model.layers.1.", *JSON_PIECES)),
    Parser("range", _range, (b"bytes=", b"-", b"9" * 19, b","), ()),
    Parser("frame", _frame, (frames.MAGIC, b"\xff\xff\xff\xff"), (BadFrame,)),
    Parser("handshake", _handshake, (handshake.MAGIC, b'"instance":"i"', b'"nonce":"', *JSON_PIECES), ()),
    Parser(
        "chat_request", _chat, (b'"messages":[{"role":"user","content":"', b'"stop":', b'"type":"text"', *JSON_PIECES)
    ),
    Parser("event_query", _event_query, (b"\n", b"1h", b"true", b"*", b"fetcher", b"9" * 19)),
    Parser("event", _event, JSON_PIECES, ()),
    Parser("sse", _sse, (b"data: ", b"id: ", b"event: ", b"\n\n", b":"), ()),
    Parser("log_line", _log_line, (b"[1] 2026/01/01 00:00:00.000000 [ERR] ", b"some avg10=", b"\x1b"), ()),
    Parser("socket_line", _control, JSON_PIECES, ()),
    Parser(
        "manifest", _manifest, (b'"files":[{"path":"', b'"sha256":"' + b"a" * 64, *JSON_PIECES), (ShoalError, Corrupt)
    ),
    Parser(
        "library",
        _library,
        (
            b"models--org--name/",
            b"snapshots/",
            b"refs/main dd ",
            b" xxxx ",
            b"/../",
            b"\n",
            b"model.safetensors.index.json",
        ),
    ),
)
