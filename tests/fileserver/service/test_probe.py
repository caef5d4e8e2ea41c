"""The probe for link measurements: N bytes for a valid token, and never more than the maximum."""

from __future__ import annotations

from pathlib import Path

from shoal_common.bus import cluster_clock
from shoal_common.identity.peer_tokens import HEALTH_NAME, PROBE_NAME
from shoal_fileserver.probe import MAX_PROBE_BYTES
from tests.fileserver.running_fileserver import admitted, read_reply, serving
from tests.harness.fresh import Fresh
from tests.harness.identities import Authority
from tests.harness.nats import NatsServer


async def test_a_probe_returns_the_bytes_it_asked_for_up_to_a_limit(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with serving(nats, tmp_path, fresh("files")) as server:
        for path, size in {"": 0, "?bytes=0": 0, "?bytes=1": 1, f"?bytes={MAX_PROBE_BYTES}": MAX_PROBE_BYTES}.items():
            reply = await server.ask(f"/v1/probe{path}")
            assert (reply.status, len(reply.body)) == (200, size), path
        for path in (
            f"?bytes={MAX_PROBE_BYTES + 1}",
            "?bytes=-1",
            "?bytes=many",
            "?bytes=" + "9" * 99,
            "?bytes=%D9%A3",
        ):
            assert (await server.ask(f"/v1/probe{path}")).status == 400, path
        assert (await server.ask("/v1/probe", method="POST", body=b"x")).status == 405
        reader, writer = await server.connect()
        for _ in range(3):  # several requests on one connection
            writer.write(b"GET /v1/probe?bytes=100 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert len((await read_reply(reader)).body) == 100
        writer.close()


async def test_I12_a_probe_wants_a_token_of_its_own(
    members_nats: NatsServer, authority: Authority, fresh: Fresh, tmp_path: Path
) -> None:
    node = fresh("files")
    peer, _ = await admitted(members_nats, authority, tmp_path, fresh("peer"), node)
    async with serving(members_nats, tmp_path, node) as server:
        now_s = cluster_clock.now_s()
        for headers in (
            {},
            peer.token(node, "a" * 64, now_s),
            peer.token(node, HEALTH_NAME, now_s),
            peer.token(node, PROBE_NAME, now_s - 3600),
        ):
            refused = await server.ask("/v1/probe?bytes=9", headers)
            assert refused.status == 401 and refused.body == (await server.ask("/v1/blobs/none")).body
        assert len((await server.ask("/v1/probe?bytes=9", peer.token(node, PROBE_NAME, now_s))).body) == 9
