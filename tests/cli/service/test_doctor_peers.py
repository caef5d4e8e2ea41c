"""How `shoal doctor` asks the fileservers of a cluster: with this node's token, inside TLS where they speak it."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal_cli.doctor.checks.peers import AddressReach
from shoal_cli.doctor.probes import peers
from shoal_cli.doctor.probes.local_node import LocalNode
from shoal_cli.doctor.probes.nats import LivenessSample
from shoal_cli.doctor.probes.tcp_connect import this_os
from shoal_common.bus.keys import liveness_key
from shoal_common.messages.liveness import LivenessRecord
from tests.fileserver.running_fileserver import admitted, serving
from tests.harness.fresh import Fresh
from tests.harness.identities import Authority
from tests.harness.nats import NatsServer, joined
from tests.harness.waiting import eventually


async def reached(
    server: NatsServer, local: LocalNode, node: str, certificates: dict[str, str]
) -> list[AddressReach]:
    """Return how a node's fileserver is reached from this one."""
    async with joined(server) as here:

        async def published() -> LivenessRecord | None:
            live = await here.buckets.live.get_as(liveness_key(node, "fileserver"), LivenessRecord)
            return live if live is not None and live.facts.links else None

        live = await eventually(published, "its addresses")
    samples = {(node, "fileserver"): LivenessSample(live, 0.0)}
    (found,), _ = await peers.probe(samples, local, certificates, this_os())
    return list(found.tried)


@pytest.mark.parametrize("bind", ["127.0.0.1", "0.0.0.0"])
async def test_a_member_is_let_in_and_a_stranger_is_not(
    members_nats: NatsServer, authority: Authority, fresh: Fresh, tmp_path: Path, bind: str
) -> None:
    node, own = fresh("files"), fresh("own")
    await admitted(members_nats, authority, tmp_path, node, own)
    strangers = Authority(tmp_path / "elsewhere")
    strangers.node(own)
    async with serving(members_nats, tmp_path, node, SHOAL_BIND=bind):
        local = LocalNode(home=tmp_path / own, node=own)
        tried = await reached(members_nats, local, node, authority.certificates)
        assert tried and all(address.is_good for address in tried)
        stranger = LocalNode(home=strangers.directory / own, node=own)
        tried = await reached(members_nats, stranger, node, authority.certificates)
        assert tried and not any(address.is_good for address in tried)
