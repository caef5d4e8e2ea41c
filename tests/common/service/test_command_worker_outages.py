"""Commands through crashes and outages: nothing acknowledged is lost, nothing runs twice at the same time."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from shoal_common.bus.keys import done_key
from shoal_common.messages.envelope import Command, Outcome
from shoal_common.rpc.command_worker import CommandHandler
from tests.common.command_service import ask, nothing_left, pulling, subject, working
from tests.harness.fresh import Fresh
from tests.harness.nats import NatsServer, joined
from tests.harness.process import node_environment, started
from tests.harness.waiting import eventually

TOY = str(Path(__file__).parents[1] / "toy_service.py")


async def test_I6_a_command_of_a_killed_worker_is_finished_by_the_next(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    home, begun, identity = tmp_path / "home", tmp_path / "begun", fresh("id")
    home.mkdir()
    (home / "node.toml").write_text(f'id = "{(node := fresh("node"))}"\n')
    environment = node_environment(home, nats.url, TOY_ACK_WAIT_S="3")
    async with joined(nats) as here:
        async with started(TOY, environment=environment) as first:
            await first.wait_ready()
            body = json.dumps({"path": str(begun)}).encode()
            await here.client.publish(subject(node, "work"), body, headers={"Nats-Msg-Id": identity})

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


class Slow(Command, kw_only=True):
    """A handler that waits at a gate."""


async def test_I6_nats_killed_during_a_command_loses_nothing(own_nats: NatsServer) -> None:
    begun: list[str] = []
    gate = asyncio.Event()

    async def slow(command: Slow, identity: str) -> dict[str, str]:
        begun.append(identity)
        await gate.wait()
        return {"identity": identity}

    async with joined(own_nats) as here, working(here, "node-a", {"slow": CommandHandler(Slow, slow, 60.0)}):
        asking = asyncio.create_task(ask(here, "node-a", "slow", b"{}", "id-1"))

        async def has_begun() -> bool:
            return bool(begun)

        await eventually(has_begun, "the command is worked on")
        own_nats.restart()
        await eventually(lambda: pulling(here, "node-a"), "the worker pulls again")
        gate.set()
        outcome = await eventually(lambda: here.buckets.done.get_as("id-1", Outcome), "it is done")
        assert outcome.ok
        assert (await asking).id == "id-1"
        await nothing_left(here, "node-a")
        assert begun == ["id-1"]


async def test_commands_continue_after_nats_loses_its_store(own_nats: NatsServer) -> None:
    async def slow(command: Slow, identity: str) -> dict[str, str]:
        return {"identity": identity}

    async with joined(own_nats) as here, working(here, "node-a", {"slow": CommandHandler(Slow, slow, 60.0)}):
        assert (await ask(here, "node-a", "slow", b"{}")).ok
        own_nats.wipe()
        async with joined(own_nats):  # the first one to connect creates the streams again
            pass

        async def pulls() -> bool:
            return here.nats.connected and await pulling(here, "node-a")

        await eventually(pulls, "the worker pulls again")
        assert (await ask(here, "node-a", "slow", b"{}")).ok
