"""A command and its sender, through outages of NATS and of its service: it runs once, or is reported as not run."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shoal_common.bus.keys import done_key, node_key, storage_key
from shoal_common.bus.subjects import ANY
from shoal_common.concurrency.cancellation import cancel_and_wait
from shoal_common.liveness.liveness import Liveness
from shoal_common.messages.envelope import Command, Outcome
from shoal_common.messages.placement import NodeState
from shoal_common.messages.storage import StorageState
from shoal_common.rpc import command_client
from shoal_common.rpc.command_client import CommandClient
from shoal_common.rpc.command_worker import CommandHandler
from tests.common.command_service import SERVICE, ask, nothing_left, subject, working
from tests.harness.fresh import Fresh
from tests.harness.nats import Joined, NatsServer, joined
from tests.harness.process import node_environment, started
from tests.harness.waiting import eventually

TOY = str(Path(__file__).parents[1] / "toy_service.py")
DEADLINE_S = 60.0


class Work(Command, kw_only=True):
    """A command that waits at a gate."""


class Bench:
    """Records which commands were started; each continues when the gate is open."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.gate = asyncio.Event()
        self.verbs = {"work": CommandHandler(Work, self._work, DEADLINE_S)}

    async def _work(self, command: Work, identity: str) -> dict[str, str]:
        self.begun.append(identity)
        await self.gate.wait()
        return {"identity": identity}

    async def has_begun(self) -> bool:
        return bool(self.begun)


@asynccontextmanager
async def alive(here: Joined, node: str, service: str = SERVICE) -> AsyncIterator[Liveness]:
    """Publish a node's service as live while the body runs."""
    liveness = Liveness(here.buckets.live, node, service)
    await liveness.claim()
    beating = asyncio.create_task(liveness.renew_forever())
    try:
        yield liveness
    finally:
        await cancel_and_wait(beating)
        await liveness.remove_key()


def send(here: Joined, node: str, identity: str, deadline_s: float = DEADLINE_S) -> asyncio.Task[Outcome]:
    """Send `work` as the gateway does."""
    sender = CommandClient(here.nats, here.buckets)
    return asyncio.create_task(sender.send(SERVICE, node, "work", Work(), identity, deadline_s))


async def wait_queued(here: Joined, node: str) -> None:
    """Return once a command for the node is in the queue."""

    async def kept() -> bool:
        return bool((await here.js.stream_info("CMD", subjects_filter=subject(node, "*"))).state.subjects)

    await eventually(kept, "the command is in the queue")


async def test_a_command_nats_lost_before_storing_is_sent_and_run_once(own_nats: NatsServer) -> None:
    async with (
        joined(own_nats) as here,
        joined(own_nats) as other,
        alive(other, "node-a"),
        working(other, "node-a", (bench := Bench()).verbs),
    ):
        bench.gate.set()
        os.kill(own_nats.pid, signal.SIGSTOP)  # nobody reads what is sent now
        before = here.client.stats["out_msgs"]
        outcome = send(here, "node-a", "id-1")

        async def left_us() -> bool:
            return here.client.stats["out_msgs"] > before and not here.client.pending_data_size

        await eventually(left_us, "the command is on its way")
        own_nats.restart()
        assert (await outcome).result == {"identity": "id-1"}
        assert bench.begun == ["id-1"]


async def test_a_command_lost_with_the_store_while_running_runs_once(
    own_nats: NatsServer,
) -> None:
    async with (
        joined(own_nats) as here,
        working(here, "node-a", (bench := Bench()).verbs),
        alive(here, "node-a") as liveness,
    ):
        outcome = send(here, "node-a", "id-1")
        await eventually(bench.has_begun, "it is worked on")
        own_nats.wipe()
        async with joined(own_nats) as again:  # the first one to connect creates the streams again
            liveness.renew_now()
            await wait_queued(again, "node-a")  # once more, while the first one still runs
            bench.gate.set()
            assert (await outcome).result == {"identity": "id-1"}
            await nothing_left(again, "node-a")
        assert bench.begun == ["id-1"]


async def test_two_copies_of_a_killed_workers_command_run_once(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    home, begun, identity = tmp_path / "home", tmp_path / "begun", fresh("id")
    home.mkdir()
    (home / "node.toml").write_text(f'id = "{(node := fresh("node"))}"\n')
    environment = node_environment(home, nats.url, TOY_ACK_WAIT_S="3", SHOAL_LOG="debug")
    async with joined(nats) as here:
        async with started(TOY, environment=environment) as first:
            await first.wait_ready()
            body = {"path": str(begun)}
            for data, headers in (
                ({**body, "id": identity}, None),  # without the header the stream does not deduplicate this one
                (body, {"Nats-Msg-Id": identity}),
            ):
                await here.client.publish(subject(node, "work"), json.dumps(data).encode(), headers=headers)

            async def has_begun() -> bool:
                return begun.exists()

            await eventually(has_begun, "the command is worked on")
            await first.kill()
        async with started(TOY, environment=environment) as second:
            await second.wait_ready()
            outcome = await eventually(
                lambda: here.buckets.done.get_as(done_key(identity), Outcome), "it is finished"
            )
            assert outcome.ok and outcome.result == {"identity": identity}
            await nothing_left(here, node)
            assert sum('msg="command started"' in line for line in second.lines) == 1, second.output


async def test_a_command_stored_after_its_sender_gave_up_is_not_run(own_nats: NatsServer) -> None:
    async with (
        joined(own_nats) as here,
        joined(own_nats) as other,
        working(other, "node-a", (bench := Bench()).verbs),
    ):
        bench.gate.set()
        os.kill(own_nats.pid, signal.SIGSTOP)
        await asyncio.to_thread(os.waitpid, own_nats.pid, os.WUNTRACED)  # it stops a moment after the signal is sent
        try:
            outcome = await send(here, "node-a", "id-1", deadline_s=0.5)
        finally:
            os.kill(own_nats.pid, signal.SIGCONT)
        assert outcome.error is not None and outcome.error.code == "expired"
        assert "node-a" in outcome.error.message
        late = await eventually(lambda: here.buckets.done.get_as("id-1", Outcome), "it has an outcome")
        assert late.error is not None and late.error.code == "expired"
        assert "was not run" in late.error.message
        await nothing_left(here, "node-a")
        assert bench.begun == []


async def test_a_command_for_an_unknown_node_ends_early(
    nats: NatsServer, fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_client, "DOWN_AFTER_S", 0.5)
    async with joined(nats) as here:
        node, identity = fresh("node"), fresh("id")
        outcome = await send(here, node, identity)
        assert outcome.error is not None and outcome.error.code == "node_down"
        assert node in outcome.error.message and "there is no such node" in outcome.error.message
        assert await here.buckets.done.get_as(done_key(identity), Outcome) == outcome
        # The service is there after all: a command reported as not run does not run, and the queue is empty.
        async with alive(here, node), working(here, node, (bench := Bench()).verbs):
            bench.gate.set()
            assert (await ask(here, node, "work", b"{}")).ok
            await nothing_left(here, node)
            assert identity not in bench.begun


async def test_a_command_for_a_down_node_names_how_long_it_is_down(
    nats: NatsServer, fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_client, "DOWN_AFTER_S", 0.5)
    async with joined(nats) as here:
        node = fresh("node")
        await here.buckets.state.put(storage_key(node), StorageState(node=node))
        outcome = await send(here, node, fresh("id"))
        assert outcome.error is not None and f"its {SERVICE} is not live" in outcome.error.message
        await here.buckets.state.put(node_key(node), NodeState(node=node, down_since_s=86400.0))
        outcome = await send(here, node, fresh("id"))
        assert outcome.error is not None and outcome.error.code == "node_down" and outcome.error.retryable
        assert "down since 1970-01-02T00:00:00" in outcome.error.message
        assert outcome.error.details == {"node": node, "down_since_s": 86400.0}


async def test_a_deadline_below_the_timeout_names_the_down_node_too(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        outcome = await send(here, node := fresh("node"), fresh("id"), deadline_s=0.5)
        assert outcome.error is not None and outcome.error.code == "node_down" and node in outcome.error.message


async def test_a_service_back_in_time_runs_the_waiting_commands(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        node, identity = fresh("node"), fresh("id")
        outcome = send(here, node, identity)
        await wait_queued(here, node)
        async with alive(here, node), working(here, node, (bench := Bench()).verbs):
            bench.gate.set()
            assert (await outcome).result == {"identity": identity}


async def test_an_any_node_command_waits_and_is_cancelled_without_one(
    own_nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with joined(own_nats) as here:
        patient = send(here, ANY, "id-1")
        await wait_queued(here, ANY)
        async with alive(here, "node-b"), working(here, ANY, (bench := Bench()).verbs):
            bench.gate.set()
            assert (await patient).result == {"identity": "id-1"}
        monkeypatch.setattr(command_client, "DOWN_AFTER_S", 0.5)
        nobody = await send(here, ANY, "id-2")  # node-b's key is still listed, as a deletion marker
        assert nobody.error is not None and nobody.error.code == "node_down"
        assert f"no node runs {SERVICE}" in nobody.error.message
