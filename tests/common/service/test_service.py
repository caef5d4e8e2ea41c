"""The main loop of a service, as its supervisor sees it: real processes, signals and exit codes."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from pathlib import Path

import pytest

from shoal_common.bus.keys import liveness_key
from shoal_common.messages.liveness import LivenessRecord
from shoal_common.rpc.request_reply import RpcClient
from tests.common.toy_service import Echo
from tests.harness.fresh import Fresh
from tests.harness.nats import Joined, NatsServer, joined
from tests.harness.process import node_environment, started

TOY = str(Path(__file__).parents[1] / "toy_service.py")


class Home:
    """A node's directory with an id of this test's own, and the environment of its services."""

    def __init__(self, directory: Path, node: str, nats_url: str) -> None:
        self.node, self.directory, self._url = node, directory / node, nats_url
        self.directory.mkdir()
        (self.directory / "node.toml").write_text(f'id = "{node}"\n')

    def environment(self, **more: str) -> dict[str, str]:
        return node_environment(self.directory, self._url, **more)


@pytest.fixture
def home(tmp_path: Path, nats: NatsServer, fresh: Fresh) -> Home:
    return Home(tmp_path, fresh("node"), nats.url)


async def live(here: Joined, node: str) -> LivenessRecord | None:
    return await here.buckets.live.get_as(liveness_key(node, "storage"), LivenessRecord)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_a_service_and_unpublishes_its_key(
    nats: NatsServer, home: Home, number: signal.Signals
) -> None:
    async with joined(nats) as here, started(TOY, environment=home.environment()) as toy:
        await toy.wait_ready()
        there = await live(here, home.node)
        assert there is not None and there.holder.pid == toy.pid
        started_s = time.monotonic()
        toy.send(number)
        assert await toy.wait_exit() == 0, toy.output
        assert time.monotonic() - started_s < 3
        assert await live(here, home.node) is None
        assert "level=error" not in toy.output and "Traceback" not in toy.output


async def test_a_crash_in_a_task_ends_the_process_with_one_error_line(nats: NatsServer, home: Home) -> None:
    async with joined(nats) as here, started(TOY, environment=home.environment(TOY="crash")) as toy:
        assert await toy.wait_exit() == 1
        errors = [line for line in toy.lines if "level=error" in line]
        assert len(errors) == 1
        assert "one task failed\\non two lines" in errors[0] and "trace=" in errors[0]
        assert all(line.startswith("ts=") for line in toy.lines), toy.output
        assert await live(here, home.node) is None


async def test_a_second_process_of_a_service_exits_with_9(nats: NatsServer, home: Home) -> None:
    async with joined(nats) as here, started(TOY, environment=home.environment()) as first:
        await first.wait_ready()
        async with started(TOY, environment=home.environment()) as second:
            assert await second.wait_exit() == 9
            assert f"pid {first.pid}" in second.lines[-1]
        there = await live(here, home.node)
        assert first.running and there is not None and there.holder.pid == first.pid


async def test_a_bad_setting_ends_a_service_with_2_in_one_line(home: Home) -> None:
    async with started(TOY, environment=home.environment(SHOAL_BIND="0.0.0.0")) as toy:
        assert await toy.wait_exit() == 2
        assert len(toy.lines) == 1 and "without an identity" in toy.lines[0]


async def test_systemd_hears_of_ready_watchdog_and_stopping(home: Home, tmp_path: Path) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(path))
        supervisor.setblocking(False)

        async def hear(word: str) -> str:
            async with asyncio.timeout(45):
                while True:
                    message = (await asyncio.get_running_loop().sock_recv(supervisor, 4096)).decode()
                    if word in message:
                        return message

        environment = home.environment(NOTIFY_SOCKET=str(path), WATCHDOG_USEC="300000")
        async with started(TOY, environment=environment) as toy:
            assert f"STATUS=node {home.node}" in await hear("READY=1")
            for _ in range(3):
                await hear("WATCHDOG=1")
            toy.send(signal.SIGTERM)
            await hear("STOPPING=1")
            assert await toy.wait_exit() == 0


async def test_a_service_whose_shared_threads_hang_ends_itself(home: Home) -> None:
    environment = home.environment(TOY="blocked", TOY_BLOCKED_TIMEOUT_S="7")
    async with started(TOY, environment=environment) as toy:
        assert await toy.wait_exit() == 1
        assert any("Timeout (0:00:07)!" in line for line in toy.lines), "with a trace of every thread"


async def test_a_supervisor_that_does_not_listen_is_no_reason_to_fail(home: Home, tmp_path: Path) -> None:
    environment = home.environment(NOTIFY_SOCKET=str(tmp_path / "nobody"), WATCHDOG_USEC="300000")
    async with started(TOY, environment=environment) as toy:
        await toy.wait_ready()
        toy.send(signal.SIGTERM)
        assert await toy.wait_exit() == 0


async def test_a_service_waits_for_nats_and_can_be_stopped_meanwhile(own_nats: NatsServer, tmp_path: Path) -> None:
    one, other = Home(tmp_path, "node-a", own_nats.url), Home(tmp_path, "node-b", own_nats.url)
    own_nats.stop()
    async with started(TOY, environment=one.environment()) as patient:
        async with started(TOY, environment=other.environment()) as stopped:
            await asyncio.gather(*(toy.wait_line("waiting for NATS") for toy in (patient, stopped)))
            stopped.send(signal.SIGTERM)
            assert await stopped.wait_exit() == 0, stopped.output
        assert patient.running
        own_nats.start()
        await patient.wait_ready()
        patient.send(signal.SIGTERM)
        assert await patient.wait_exit() == 0


async def test_a_service_that_does_not_stop_is_stopped_at_its_deadline(home: Home) -> None:
    async with started(TOY, environment=home.environment(TOY="deaf", TOY_STOP_DEADLINE_S="0.3")) as toy:
        await toy.wait_ready()
        toy.send(signal.SIGTERM)
        assert await toy.wait_exit(5) == 0
        assert "not stopped in time" in toy.output


async def test_the_clean_up_of_a_background_task_runs_to_its_end(home: Home) -> None:
    async with started(TOY, environment=home.environment(TOY="tidy")) as toy:
        await toy.wait_ready()
        toy.send(signal.SIGTERM)
        assert await toy.wait_exit() == 0
        assert "cleaning up" in toy.output and "cleaned up" in toy.output, toy.output


async def test_what_a_command_has_begun_completes_before_a_stop(nats: NatsServer, home: Home) -> None:
    async with joined(nats) as here, started(TOY, environment=home.environment()) as toy:
        await toy.wait_ready()
        await here.client.publish(f"shoal.v1.cmd.storage.{home.node}.save", b"{}")
        await toy.wait_line("msg=saving")
        toy.send(signal.SIGTERM)
        assert await toy.wait_exit() == 0
        assert "msg=saved" in toy.output, toy.output


async def test_a_service_names_a_task_that_never_ends_and_exits(home: Home) -> None:
    deadlines = {"TOY_STOP_DEADLINE_S": "0.3", "TOY_CLEANUP_DEADLINE_S": "0.3"}
    async with started(TOY, environment=home.environment(TOY="stuck", **deadlines)) as toy:
        await toy.wait_ready()
        toy.send(signal.SIGTERM)
        assert await toy.wait_exit(15) == 1
        [line] = [line for line in toy.lines if "level=error" in line]
        assert "tasks did not end" in line and "toy_service.py" in line


async def test_a_second_signal_ends_it_at_once(home: Home) -> None:
    async with started(TOY, environment=home.environment(TOY="deaf")) as toy:
        await toy.wait_ready()
        toy.send(signal.SIGINT)
        await toy.wait_line("msg=stopping")
        toy.send(signal.SIGINT)
        assert await toy.wait_exit(5) == 130


async def test_a_service_can_be_stopped_while_nats_is_down(own_nats: NatsServer, tmp_path: Path) -> None:
    home = Home(tmp_path, "node-a", own_nats.url)
    async with started(TOY, environment=home.environment()) as toy:
        await toy.wait_ready()
        own_nats.kill()
        await toy.wait_line("lost NATS")
        started_s = time.monotonic()
        toy.send(signal.SIGTERM)
        assert await toy.wait_exit(15) == 0
        assert time.monotonic() - started_s < 10


async def test_a_service_continues_after_nats_loses_its_store(own_nats: NatsServer, tmp_path: Path) -> None:
    home = Home(tmp_path, "node-a", own_nats.url)
    async with started(TOY, environment=home.environment()) as toy:
        await toy.wait_ready()
        own_nats.wipe()
        await toy.wait_line("reconnected to NATS")
        async with joined(own_nats) as here:
            answer = await RpcClient(here.nats)("storage", "node-a", "echo", Echo(text="x"), Echo, restart_wait_s=10)
            assert answer == Echo(text="x")
            done = tmp_path / "done"
            done.touch()
            identity = {"Nats-Msg-Id": "after-the-wipe"}
            body = json.dumps({"path": str(done)}).encode()
            await here.client.publish("shoal.v1.cmd.storage.node-a.work", body, headers=identity)
            await toy.wait_line("command ended", "after-the-wipe", "ok=True")
        assert toy.running
