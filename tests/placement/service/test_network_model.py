"""What a link costs, and which links are measured: pure rules, then real services here and over slow links."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from shoal_common import VERSION
from shoal_common.bus.keys import links_key, liveness_key
from shoal_common.messages import WireStruct
from shoal_common.messages.liveness import LivenessRecord, NodeAddress, NodeFacts, ProcessIdentity
from shoal_common.messages.placement import LinksState, MeasuredLink, MeasureLinks, PlaceCommand, Preview, Previews
from shoal_common.rpc.request_reply import RpcClient
from shoal_placement.network.model import (
    FAILED_MEASUREMENT_MAX_AGE_S,
    MAX_PEERS,
    MEASUREMENT_MAX_AGE_S,
    MIN_COST_S,
    UNREACHABLE_COST_S,
    NetworkModel,
    NodeLink,
    link_digest,
    peers_to_measure,
    transfer_rate,
    with_measurements,
)
from shoal_placement.solver.build_problem import DEFAULT_LINK_S
from tests.harness.identities import Authority
from tests.harness.nats import NatsServer
from tests.harness.networks import Machine, machines, port_forward, relayed
from tests.harness.node import Node, running_nodes
from tests.harness.ports import ReservedPort
from tests.harness.waiting import eventually
from tests.placement.placement_cluster import MODEL, Cluster, cluster_of

T = TypeVar("T")

NODES = "abcd"
FAR_S = 0.02
MEASURED_S = 60.0
"""For a round of measurements on a busy machine."""


def fileserver_facts(host: str, kind: str = "ethernet", mbit: int = 0, port: int = 7000) -> NodeFacts:
    """Return a fileserver's facts."""
    link = NodeAddress(address=f"{host}:{port}", kind=kind, mbit=mbit)
    return NodeFacts(addresses=[link.address], links=[link])


THERE = {node: fileserver_facts(f"10.0.0.{number}") for number, node in enumerate(NODES, 1)}
HIDDEN_BYTES = 8192
measured_links = st.builds(
    MeasuredLink,
    peer=st.sampled_from(NODES),
    measured_at_s=st.floats(0, 2 * MEASUREMENT_MAX_AGE_S),
    round_trip_s=st.floats(1e-5, 1.0),
    bytes_per_s=st.floats(0, 1e10),
    error=st.sampled_from(["", "", "nobody answers"]),
)
NOW_S = 2 * MEASUREMENT_MAX_AGE_S


def records(found: Mapping[str, list[MeasuredLink]], there: Mapping[str, NodeFacts] = THERE) -> list[LinksState]:
    """Return what the nodes measured at their published addresses."""
    return [
        LinksState(
            node=n,
            links=[
                structs.replace(m, addresses_fingerprint=link_digest(there[n], there[m.peer]))
                for m in own
                if m.peer != n
            ],
        )
        for n, own in found.items()
    ]


some_records = st.dictionaries(
    st.sampled_from(NODES), st.lists(measured_links, max_size=4, unique_by=lambda m: m.peer)
)


@given(some_records)
def test_each_link_has_a_cost_and_unmeasured_ones_the_default(
    found: dict[str, list[MeasuredLink]],
) -> None:
    links = NetworkModel(records(found), THERE, NOW_S)
    costs = links.link_costs_s(list(NODES), HIDDEN_BYTES)
    tried = {(n, m.peer) for n, own in found.items() for m in own}
    for i, a in enumerate(NODES):
        for j, b in enumerate(NODES):
            if a == b:
                assert costs[i][j] == 0
                continue
            way = links.link_between(a, b)
            assert costs[i][j] == way.cost_s(HIDDEN_BYTES) >= MIN_COST_S
            if not {(a, b), (b, a)} & tried:
                assert not way.measured and way.latency_s == DEFAULT_LINK_S
            if way.measured and way.latency_s < UNREACHABLE_COST_S / 2:
                trips = [m.round_trip_s for x, y in ((a, b), (b, a)) for m in found.get(x, []) if m.peer == y]
                assert way.latency_s * 2 in trips


@given(st.floats(1e-6, 5), st.just(0.0) | st.floats(1e6, 1e11), st.integers(0, 1 << 20))
def test_a_link_costs_its_latency_and_its_bytes_within_bounds(
    latency_s: float, bytes_per_s: float, hidden_bytes: int
) -> None:
    exact_s = latency_s + (hidden_bytes / bytes_per_s if bytes_per_s else 0)
    assert NodeLink(latency_s, bytes_per_s).cost_s(hidden_bytes) == pytest.approx(exact_s, rel=0.06, abs=MIN_COST_S)


@given(some_records, st.sampled_from(NODES), st.floats(0, 4 * MEASUREMENT_MAX_AGE_S))
def test_a_fresh_measurement_is_not_repeated_for_an_hour(
    found: dict[str, list[MeasuredLink]], node: str, now_s: float
) -> None:
    own = next((s for s in records(found) if s.node == node), None)
    missing = peers_to_measure(node, NODES, own, THERE, now_s)
    assert node not in missing and missing == sorted(set(missing))
    for link in own.links if own is not None else []:
        lately = now_s - link.measured_at_s < (FAILED_MEASUREMENT_MAX_AGE_S if link.error else MEASUREMENT_MAX_AGE_S)
        assert (link.peer in missing) != lately
    assert set(NODES) - {node} - {link.peer for link in (own.links if own else [])} <= set(missing)


@given(some_records, st.sampled_from(NODES))
def test_a_measurement_is_void_once_a_node_has_other_addresses(
    found: dict[str, list[MeasuredLink]], moved: str
) -> None:
    there = {**THERE, moved: fileserver_facts("10.9.9.9", "wifi")}
    links = NetworkModel(records(found), there, NOW_S)
    for node in set(NODES) - {moved}:
        assert not links.link_between(node, moved).measured and not links.link_between(moved, node).measured
        assert moved in peers_to_measure(
            node, NODES, next((s for s in records(found) if s.node == node), None), there, 0.0
        )
    again = {n: fileserver_facts(f.addresses[0].rpartition(":")[0], port=7001) for n, f in THERE.items()}
    assert (
        NetworkModel(records(found), again, NOW_S).measured_links
        == NetworkModel(records(found), THERE, NOW_S).measured_links
    )


@given(st.lists(st.tuples(st.integers(0, 200), st.floats(0, 1e6)), max_size=150))
def test_I7_a_node_keeps_one_measurement_a_peer_and_the_latest(seen: list[tuple[int, float]]) -> None:
    state = None
    for peer, at_s in seen:
        state = with_measurements("me", state, [MeasuredLink(peer=f"n{peer}", measured_at_s=at_s)])
        names = [link.peer for link in state.links]
        assert len(names) == len(set(names)) <= MAX_PEERS
        if len(names) == MAX_PEERS:
            continue
        assert f"n{peer}" in names


@given(st.floats(1e3, 1e10), st.lists(st.integers(1, 1 << 20), min_size=2, max_size=50), st.floats(0, 1))
def test_a_steady_rate_is_found_however_slowly_it_began(bytes_per_s: float, pieces: list[int], late_s: float) -> None:
    got, taken = 0, []
    for piece in pieces:
        got += piece
        taken.append((got / bytes_per_s, got))
    assert transfer_rate(taken) == pytest.approx(bytes_per_s, rel=1e-6)
    slow = [(late_s + 1, 1)]  # one byte long before the rest
    assert transfer_rate([*slow, *((late_s + 1 + 4 * (late_s + 1) + at_s, 1 + b) for at_s, b in taken)]) > 0
    assert transfer_rate([]) == 0.0


def test_a_peer_nobody_reaches_counts_as_far_for_some_minutes() -> None:
    failed = MeasuredLink(
        peer="b", measured_at_s=0.0, addresses_fingerprint=link_digest(THERE["a"], THERE["b"]), error="nobody answers"
    )
    tried = [LinksState(node="a", links=[failed])]
    assert (
        NetworkModel(tried, THERE, FAILED_MEASUREMENT_MAX_AGE_S - 1).link_between("a", "b").latency_s
        == UNREACHABLE_COST_S
    )
    assert NetworkModel(tried, THERE, FAILED_MEASUREMENT_MAX_AGE_S + 1).link_between("a", "b") == NetworkModel(
        [], THERE, 0
    ).link_between("a", "b")


def test_interface_facts_are_used_where_nothing_was_measured() -> None:
    there = {
        "a": fileserver_facts("1", "thunderbolt", 40_000),
        "b": fileserver_facts("2", "ethernet", 100),
        "c": fileserver_facts("3", "wifi"),
    }
    links = NetworkModel([], there, 0.0)
    assert links.link_between("a", "b") == links.link_between("b", "a") == NodeLink(DEFAULT_LINK_S, 12.5e6)
    assert links.link_between("b", "c").latency_s > DEFAULT_LINK_S > links.link_between("a", "a").latency_s
    assert links.link_between("a", "unknown") == NodeLink() and NodeLink().cost_s(HIDDEN_BYTES) == DEFAULT_LINK_S
    assert NetworkModel().link_costs_s(["a", "b"], 1).tolist() == [[0.0, DEFAULT_LINK_S], [DEFAULT_LINK_S, 0.0]]


# Real placement services and fileservers; their inference keys, with the memory, are written by the test.


@asynccontextmanager
async def measuring(
    server: NatsServer, authority: Authority, home: Path, far: Machine | None = None
) -> AsyncIterator[Cluster]:
    """Run nodes a, b and c. If a machine is given, c is on it, 20 ms away from the others each way."""
    reserved = {n: ReservedPort() for n in "abc"}
    ports = {n: port.number for n, port in reserved.items()}
    near = {"SHOAL_ADVERTISE": "127.0.0.1"} if far is not None else {}
    nodes = [
        Node(
            home / n,
            n,
            server.url,
            ("fileserver", "placement"),
            SHOAL_FILESERVER_PORT=str(port),
            **near,
        )
        for n, port in ports.items()
    ]
    for node in nodes:
        authority.node(node.id, node.home)
    async with AsyncExitStack() as stack:
        if far is not None:
            for service in nodes[2].services.values():
                service.within = far.within
            stack.enter_context(relayed(far, int(server.url.rpartition(":")[2])))
            for near_by in "ab":
                stack.enter_context(relayed(far, ports[near_by], FAR_S))
            stack.enter_context(port_forward(far, "127.0.0.1", ports["c"], ports["c"], FAR_S))
        stack.enter_context(running_nodes(*nodes))
        c = await stack.enter_async_context(cluster_of(server, home))
        await authority.publish(c.here.buckets)
        for node in nodes:
            await node.ready(c.here)
        await c.hold("a")
        try:
            yield c
        except BaseException:
            print(*(node.log() for node in nodes), sep="\n")
            raise


async def asked(c: Cluster, node: str, verb: str, question: WireStruct, kind: type[T]) -> T:
    """Return the answer of a node's placement service, once that is live."""
    return await RpcClient(c.here.nats)("placement", node, verb, question, kind, MEASURED_S, MEASURED_S)


async def shown(c: Cluster, **more: Any) -> list[Preview]:
    """Return the previews of node a, with a little more memory on c than on a and b."""
    await asyncio.gather(c.beat("a", 500), c.beat("b", 500), c.beat("c", 520))
    question = PlaceCommand(model=MODEL, **more)
    return (await asked(c, "a", "previews", question, Previews)).previews


async def all_measured(c: Cluster) -> list[LinksState]:
    """Return what the three nodes have measured, once all links are measured."""

    async def published() -> list[LinksState] | None:
        await shown(c)
        found = [await c.here.buckets.state.get_as(links_key(n), LinksState) for n in "abc"]
        states = [s for s in found if s is not None]
        return states if [len(s.links) for s in states] == [2, 2, 2] else None

    return await eventually(published, "all links are measured", MEASURED_S)


async def test_links_are_measured_on_demand_and_then_not_for_an_hour(
    own_members_nats: NatsServer, authority: Authority, tmp_path: Path
) -> None:
    async with measuring(own_members_nats, authority, tmp_path) as c:
        assert await c.here.buckets.state.keys("links.>") == []
        first = next(p for p in await shown(c) if len(p.stages) == 2)
        assert not any(s.link_measured for s in first.stages) and all(s.link_s > 0 for s in first.stages)
        states = await all_measured(c)
        for state in states:
            for link in state.links:
                assert link.round_trip_s > 0 and link.bytes_per_s > 0 and not link.error, link
        then = next(p for p in await shown(c) if len(p.stages) == 2)
        assert all(s.link_measured and s.link_s > 0 for s in then.stages)
        again = await asked(c, "b", "links", MeasureLinks(peers=["a", "c", "gone"]), LinksState)
        assert again == states[1]


async def test_a_peer_that_does_not_answer_is_published_as_unreachable(
    own_members_nats: NatsServer, authority: Authority, tmp_path: Path, closed_port: int
) -> None:
    async with measuring(own_members_nats, authority, tmp_path) as c:
        facts = NodeFacts(addresses=[f"127.0.0.1:{closed_port}"])
        live = LivenessRecord(holder=ProcessIdentity(uid="d", host="elsewhere", pid=1), version=VERSION, facts=facts)
        await c.here.buckets.live.put(liveness_key("d", "fileserver"), live)

        async def tried() -> LinksState | None:
            found = await asked(c, "b", "links", MeasureLinks(peers=["d"]), LinksState)
            return found if found.links else None

        (link,) = (await eventually(tried, "b has seen d and tried to reach it")).links
        assert link.peer == "d" and link.error and not link.round_trip_s


@pytest.fixture
def far() -> Iterator[Machine]:
    """A network namespace that is reached only through relays."""
    with machines("far") as (machine,):
        yield machine


async def test_a_node_behind_a_slow_link_is_avoided_once_measured(
    own_members_nats: NatsServer, authority: Authority, tmp_path: Path, far: Machine
) -> None:
    async with measuring(own_members_nats, authority, tmp_path, far) as c:
        first = await shown(c)
        assert "c" in {s.node for s in first[0].stages}, "it has the most memory, and nothing speaks against it"
        await all_measured(c)
        best = (await shown(c))[0]
        assert {s.node for s in best.stages} == {"a", "b"} and all(s.link_measured for s in best.stages)
        slow = (await shown(c, nodes=["a", "c"]))[0]
        assert all(s.link_measured and s.link_s >= FAR_S for s in slow.stages)
        assert slow.first_token_s >= 2 * FAR_S > best.first_token_s
        await asyncio.gather(c.beat("a", 500), c.beat("b", 500), c.beat("c", 520))
        assert {s.node for s in (await c.placed()).stages} == {"a", "b"}
