"""Who may read from a fileserver: the nodes that share a secret with it, and nobody else, wherever it listens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from shoal_common.bus.keys import liveness_key
from shoal_common.identity.certificates import node_host
from shoal_common.identity.peer_tokens import HEALTH_NAME, PROBE_NAME
from shoal_common.identity.tls import client_context
from shoal_common.messages.liveness import LivenessRecord, NodeFacts
from tests.fileserver.running_fileserver import Fileserver, add_blob, admitted, serving
from tests.harness.fresh import Fresh
from tests.harness.identities import Authority
from tests.harness.nats import NatsServer, joined
from tests.harness.networks import Machine, machines, relayed, wire
from tests.harness.node import Node, running_nodes
from tests.harness.process import node_environment, started
from tests.harness.waiting import eventually

BLOB_PATHS = ("/v1/blobs/{}", "/v1/blobs/{}/any", "/v1/leaves/{}", "/v1/blobs/..", "/v1/blobs/x/y")
OTHER_PATHS = ("/v1/probe?bytes=9", "/health", "/nothing", "/", "/v1")
HUB_PATHS = ("/api/models/org/m", "/api/models/org/m/tree/main", "/org/m/resolve/main/config.json")
WIRE_DEADLINE_S = 10.0


async def facts_of(nats: NatsServer, node: str) -> NodeFacts:
    """Return what a fileserver publishes, once it has addresses."""
    async with joined(nats) as here:

        async def published() -> NodeFacts | None:
            live = await here.buckets.live.get_as(liveness_key(node, "fileserver"), LivenessRecord)
            return live.facts if live is not None and live.facts.links else None

        return await eventually(published, "its addresses")


async def refusals(server: Fileserver, blob: str, headers: dict[str, str]) -> set[tuple[int, bytes]]:
    """Return all answers to requests of every kind."""
    paths = [path.format(blob) for path in (*BLOB_PATHS, *OTHER_PATHS)]
    replies = [await server.ask(path, headers) for path in paths]
    hub = [await server.ask(path, headers) for path in HUB_PATHS]
    assert {reply.status for reply in hub} <= {401}
    return {(reply.status, reply.body) for reply in replies}


async def test_I12_every_refusal_is_the_same(
    members_nats: NatsServer, authority: Authority, fresh: Fresh, tmp_path: Path
) -> None:
    node, b_node, now_s = fresh("files"), fresh("b"), time.time()
    a, b, own = await admitted(members_nats, authority, tmp_path, fresh("a"), b_node, node)
    strangers = Authority(tmp_path / "other")
    stranger = strangers.tokens(strangers.node("stranger"))
    strangers.node(node)
    (tmp_path / node / "api.key").write_text(f"shoal-{'k' * 43}")
    async with serving(members_nats, tmp_path, node) as server:
        blob = server.add(b"abc")
        sent = [tokens.token(node, blob, now_s)["Authorization"] for tokens in (a, b)]
        name, until, _ = sent[0].removeprefix("Shoal ").split(".")
        macs = [value.rpartition(".")[2] for value in sent]
        wrong: list[dict[str, str]] = [
            {},
            a.token(b_node, blob, now_s),
            a.token(node, "cd" * 32, now_s),
            a.token(node, blob, now_s - 3600),
            a.token(node, blob, now_s + 3600),
            stranger.token(node, blob, now_s),
            {"Authorization": f"Shoal {name}.{until}.{macs[1]}"},
            {"Authorization": f"Shoal {b_node}.{until}.{macs[0]}"},
            {"Authorization": f"Shoal {name}.{until}."},
            {"Authorization": f"Shoal {until}.{macs[0]}"},
            {"Authorization": "Bearer \xff\xfe"},
            {"Authorization": "Shoal "},
        ]
        found = set()
        for headers in wrong:
            found |= await refusals(server, blob, headers)
        assert len(found) == 1 and found.pop()[0] == 401
        for tokens in (a, b, own):
            assert (await server.ask(f"/v1/blobs/{blob}", tokens.token(node, blob, now_s))).body == b"abc"
            assert (await server.ask("/health", tokens.token(node, HEALTH_NAME, now_s))).status == 200
        assert not [mac for mac in macs if mac in server.process.output]


async def test_I12_a_revoked_member_is_refused_at_once(
    members_nats: NatsServer, authority: Authority, fresh: Fresh, tmp_path: Path
) -> None:
    node, peer = fresh("files"), fresh("peer")
    tokens, _ = await admitted(members_nats, authority, tmp_path, peer, node)
    async with serving(members_nats, tmp_path, node) as server:
        blob = server.add(b"abc")
        token = tokens.token(node, blob, time.time())
        for _ in range(2):  # on the fast path too
            reply = await server.ask(f"/v1/blobs/{blob}", {**token, "Range": "bytes=0-1"})
            assert reply.status == 206
        async with joined(members_nats) as here:
            await authority.revoke(here.buckets, peer)

        async def is_refused() -> bool:
            return (await server.ask(f"/v1/blobs/{blob}", {**token, "Range": "bytes=0-1"})).status == 401

        await eventually(is_refused, "the fileserver knows that it is no member")


async def test_I12_without_an_identity_it_stays_on_loopback(nats: NatsServer, tmp_path: Path) -> None:
    own_bind = tmp_path / "own"
    own_bind.mkdir()
    (own_bind / "node.toml").write_text('id = "own"\n[fileserver]\nbind = "0.0.0.0"\n')
    for environment in (
        node_environment(tmp_path, nats.url, SHOAL_BIND="0.0.0.0"),
        node_environment(tmp_path, nats.url, SHOAL_BIND="0.0.0.0", SHOAL_SECRET="a secret opens nothing any more"),
        node_environment(own_bind, nats.url),
    ):
        async with started("-m", "shoal_fileserver", environment=environment) as process:
            assert await process.wait_exit() == 2
            assert "will not listen on 0.0.0.0 without an identity" in process.output


async def test_I12_beyond_loopback_it_speaks_tls_and_says_so(
    members_nats: NatsServer, authority: Authority, fresh: Fresh, tmp_path: Path
) -> None:
    node = fresh("files")
    peer, _ = await admitted(members_nats, authority, tmp_path, fresh("peer"), node)
    async with serving(members_nats, tmp_path, node, SHOAL_BIND="0.0.0.0") as server:
        blob = server.add(b"abc")
        token = peer.token(node, blob, time.time())
        facts = await facts_of(members_nats, node)
        assert {link.tls for link in facts.links} == {True}
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await server.ask(f"/v1/blobs/{blob}", token)
        server.tls = client_context(authority.certificate)
        assert (await server.ask(f"/v1/blobs/{blob}", token)).body == b"abc"
        # Who has no key of this node gets nothing, by the hub's protocol neither.
        assert {status for status, _ in await refusals(server, blob, {})} == {401}


async def test_weights_may_be_sent_unencrypted_where_a_person_says_so(
    members_nats: NatsServer, authority: Authority, fresh: Fresh, tmp_path: Path
) -> None:
    node, settings = fresh("files"), "[transfer]\nencrypt_weights = false\n"
    peer, _ = await admitted(members_nats, authority, tmp_path, fresh("peer"), node)
    async with serving(members_nats, tmp_path, node, settings, SHOAL_BIND="0.0.0.0") as server:
        blob = server.add(b"abc")
        assert {link.tls for link in (await facts_of(members_nats, node)).links} == {False}
        assert (await server.ask(f"/v1/blobs/{blob}", peer.token(node, blob, time.time()))).body == b"abc"
        assert {status for status, _ in await refusals(server, blob, {})} == {401}


async def test_a_node_that_serves_no_peers_says_so_and_refuses_them(
    members_nats: NatsServer, authority: Authority, fresh: Fresh, tmp_path: Path
) -> None:
    node, settings = fresh("files"), "[fileserver]\nserve_peers = false\n"
    peer, own = await admitted(members_nats, authority, tmp_path, fresh("peer"), node)
    async with serving(members_nats, tmp_path, node, settings) as server:
        blob, now_s = server.add(b"abc"), time.time()
        assert not (await facts_of(members_nats, node)).serves_peers
        for name, path in ((blob, f"/v1/blobs/{blob}"), (blob, f"/v1/leaves/{blob}"), (PROBE_NAME, "/v1/probe")):
            assert (await server.ask(path, peer.token(node, name, now_s))).status == 401
        assert (await server.ask(f"/v1/blobs/{blob}", own.token(node, blob, now_s))).body == b"abc"
        assert (await server.ask("/health", peer.token(node, HEALTH_NAME, now_s))).status == 200


async def test_its_bind_address_and_its_connections_are_settings(
    nats: NatsServer, members_nats: NatsServer, authority: Authority, fresh: Fresh, tmp_path: Path
) -> None:
    node, settings = fresh("files"), '[fileserver]\nbind = "127.0.0.1"\nmax_serving_connections = 2\n'
    await admitted(members_nats, authority, tmp_path, node)
    async with serving(members_nats, tmp_path, node, settings, SHOAL_BIND="0.0.0.0") as server:
        facts = await facts_of(members_nats, node)
        assert [(link.address, link.tls) for link in facts.links] == [(f"127.0.0.1:{server.port}", False)]
        (first, _), (second, _) = await server.connect(), await server.connect()
        assert (await server.ask("/health")).status == 401
        for reader in (first, second):  # each made room for the next: one from an address
            assert await asyncio.wait_for(reader.read(), WIRE_DEADLINE_S) == b""
    for wrong in ("max_serving_connections = 0", 'serve_peers = "maybe"', "bind = 5"):
        home = tmp_path / fresh("wrong")
        home.mkdir()
        (home / "node.toml").write_text(f'id = "{fresh("wrong")}"\n[fileserver]\n{wrong}\n')
        async with started("-m", "shoal_fileserver", environment=node_environment(home, nats.url)) as process:
            assert await process.wait_exit() == 2
            assert f"fileserver.{wrong.split()[0]} in node.toml is" in process.output


@pytest.fixture
def neighbours() -> Iterator[tuple[Machine, Machine]]:
    """Two machines on one network."""
    with machines("files", "stranger") as (a, b):
        wire("lan", a, ("10.77.1.1/24",), b, ("10.77.1.2/24",))
        yield a, b


async def test_I12_another_machine_gets_nothing_without_credentials(
    members_nats: NatsServer, authority: Authority, fresh: Fresh, tmp_path: Path, neighbours: tuple[Machine, Machine]
) -> None:
    files, stranger = neighbours
    name = fresh("files")
    peer, _ = await admitted(members_nats, authority, tmp_path, fresh("peer"), name)
    context = client_context(authority.certificate)
    node = Node(tmp_path / name, name, members_nats.url, ("fileserver",), SHOAL_BIND="0.0.0.0")
    node["fileserver"].within = files.within
    nats_port = int(members_nats.url.rpartition(":")[2])

    def ask(port: int, path: str, headers: dict[str, str], is_encrypted: bool = True) -> bytes:
        """Return all that a request from the other machine is answered."""
        lines = [f"GET {path} HTTP/1.1", "Host: localhost", "Connection: close"]
        request = "\r\n".join([*lines, *(f"{k}: {v}" for k, v in headers.items()), "", ""]).encode()
        connection = stranger.connection("10.77.1.1", port)
        if is_encrypted:
            connection = context.wrap_socket(connection, server_hostname=node_host(name))
        received = b""
        with connection, suppress(ConnectionResetError):
            connection.sendall(request)
            while piece := connection.recv(1 << 16):
                received += piece
        return received

    with relayed(files, nats_port), running_nodes(node):
        async with joined(members_nats) as here:
            await node.ready(here)
        port = int((await facts_of(members_nats, name)).addresses[0].rpartition(":")[2])
        blob = add_blob(node.layout, b"abc")
        for path in (path.format(blob) for path in (*BLOB_PATHS, *OTHER_PATHS, *HUB_PATHS)):
            for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": f"Shoal {name}.9.x"}):
                answer = await asyncio.to_thread(ask, port, path, headers)
                assert answer.startswith(b"HTTP/1.1 401 ") and b"abc" not in answer, path
            assert b"HTTP/1.1" not in await asyncio.to_thread(ask, port, path, {}, False)
        token = peer.token(name, blob, time.time())
        assert (await asyncio.to_thread(ask, port, f"/v1/blobs/{blob}", token)).endswith(b"\r\n\r\nabc")
