"""Services of another major version: a new one is refused, those that meet later ignore each other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shoal_common import VERSION
from shoal_common.bus.keys import liveness_key
from shoal_common.bus.kv_mirror import follow_forever
from shoal_common.errors import OtherVersion
from shoal_common.host.process_identity import this_process
from shoal_common.liveness.compatibility import CompatibleLiveMirror, check_cluster_version
from shoal_common.messages import encode
from shoal_common.messages.liveness import LivenessRecord, NodeFacts, ProcessIdentity
from tests.harness.nats import Joined, NatsServer, joined
from tests.harness.other_version import runs_as
from tests.harness.process import Process, node_environment, started
from tests.harness.waiting import eventually

TOY = str(Path(__file__).parents[1] / "toy_service.py")
NEW = "99.1.0"


def live(version: str, uid: str = "u", host: str = "elsewhere", disk_free_bytes: int = 0) -> LivenessRecord:
    return LivenessRecord(
        holder=ProcessIdentity(uid=uid, host=host, pid=1),
        version=version,
        facts=NodeFacts(disk_free_bytes=disk_free_bytes),
    )


@asynccontextmanager
async def toy(directory: Path, nats: NatsServer, node: str, version: str = VERSION) -> AsyncIterator[Process]:
    """A real service of this version, with its node on this machine."""
    home = directory / node
    home.mkdir(exist_ok=True)
    (home / "node.toml").write_text(f'id = "{node}"\n')
    environment = node_environment(home, nats.url)
    if version != VERSION:
        environment |= runs_as(directory, version)
    async with started(TOY, environment=environment) as process:
        yield process


def test_a_live_view_has_only_services_of_our_major_version(caplog: pytest.LogCaptureFixture) -> None:
    view = CompatibleLiveMirror("1.2.3")
    view.replace({"a.storage": encode(live("1.9.0")), "b.storage": encode(live("2.0.0")), "c.storage": b"{"}, 3)
    view.apply("b.fetcher", encode(live("2.0.0")), 4)
    view.apply("d.storage", encode(live("latest")), 5)
    assert [key for key, _ in view.items("", LivenessRecord)] == ["a.storage"]
    assert {key: other.version for key, other in view.incompatible.items()} == {
        "b.storage": "2.0.0",
        "b.fetcher": "2.0.0",
        "d.storage": "latest",
    }
    assert view.revision == 5
    view.apply("a.storage", encode(live("2.0.1", uid="v")), 6)
    view.apply("b.storage", encode(live("1.0.0", uid="v")), 7)
    view.apply("b.fetcher", None, 8)
    assert [key for key, _ in view.items("", LivenessRecord)] == ["b.storage"]
    assert set(view.incompatible) == {"a.storage", "d.storage"}


def test_an_ignored_node_is_logged_once_and_not_at_every_beat(
    caplog: pytest.LogCaptureFixture,
) -> None:
    view = CompatibleLiveMirror("1.2.3")
    values = {"b.storage": encode(live("2.0.0"))}
    for round_number in range(3):
        view.replace(dict(values), round_number)
        view.apply("b.storage", encode(live("2.0.0", disk_free_bytes=round_number)), 10 + round_number)
        view.apply("b.fetcher", encode(live("2.0.0", disk_free_bytes=round_number)), 20 + round_number)
        values["b.fetcher"] = encode(live("2.0.0"))
    assert len([r for r in caplog.records if "ignoring a node" in r.message]) == 1
    view.replace({}, 40)
    assert view.incompatible == {}


async def beating(here: Joined, key: str, value: LivenessRecord) -> asyncio.Task[None]:
    """A live service elsewhere: it keeps renewing its key."""

    async def renew() -> None:
        while True:
            await here.buckets.live.put(key, value)
            await asyncio.sleep(0.05)

    return asyncio.create_task(renew())


async def test_a_newcomer_is_refused_naming_the_node_and_both_versions(own_nats: NatsServer, tmp_path: Path) -> None:
    async with joined(own_nats) as here:
        await here.buckets.live.put(liveness_key("elder", "storage"), live("98.0.0"))
        renewing = await beating(here, liveness_key("elder", "storage"), live("98.0.0"))
        async with toy(tmp_path, own_nats, "young") as young:
            assert await young.wait_exit() == OtherVersion.exit_code == 10
        renewing.cancel()
        (message,) = [line for line in young.lines if "level=error" in line]
        for text in ("node elder", "98.0.0", "node young", VERSION, "code=other_version", "shoal down"):
            assert text in message, message
        assert "Traceback" not in young.output and "trace=" not in young.output
        assert await here.buckets.live.get(liveness_key("young", "storage")) is None


@pytest.mark.parametrize("version", ["garbled", "", "0.999.0"])
async def test_an_unknown_version_is_another_one(own_nats: NatsServer, version: str) -> None:
    async with joined(own_nats) as here:
        same_machine = LivenessRecord(holder=this_process(), version=version)
        await here.buckets.live.put(liveness_key("elder", "storage"), same_machine)
        with pytest.raises(OtherVersion) as refused:
            await check_cluster_version(here.nats, "young", "storage", VERSION)
        assert refused.value.details["other_node"] == "elder"


async def test_of_two_real_versions_the_elder_stays_and_the_newer_ends(own_nats: NatsServer, tmp_path: Path) -> None:
    async with toy(tmp_path, own_nats, "elder") as elder:
        await elder.wait_ready()
        async with toy(tmp_path, own_nats, "young", NEW) as young:
            assert await young.wait_exit() == 10
            assert NEW in young.lines[-1] and VERSION in young.lines[-1] and "node elder" in young.lines[-1]
        async with toy(tmp_path, own_nats, "twin") as twin:
            await twin.wait_ready()
        assert elder.running


async def test_a_cluster_is_replaced_once_its_last_old_service_is_gone(own_nats: NatsServer, tmp_path: Path) -> None:
    async with toy(tmp_path, own_nats, "a") as first, toy(tmp_path, own_nats, "b") as second:
        await asyncio.gather(first.wait_ready(), second.wait_ready())
        await first.kill()  # its key is still there
        async with toy(tmp_path, own_nats, "a", NEW) as early:
            assert await early.wait_exit() == 10
            assert "node b" in early.lines[-1]  # not the one that is known to be dead
        await second.kill()
    async with toy(tmp_path, own_nats, "b", NEW) as new_b, toy(tmp_path, own_nats, "a", NEW) as new_a:
        await asyncio.gather(new_a.wait_ready(), new_b.wait_ready())


async def test_keys_of_a_dead_old_cluster_block_newcomers_until_expiry(own_nats: NatsServer, tmp_path: Path) -> None:
    async with joined(own_nats) as here:
        await here.buckets.live.create(liveness_key("dead", "storage"), live("98.0.0"), ttl_s=4)
        async with toy(tmp_path, own_nats, "young") as young:
            await young.wait_line(
                "waiting for services of another version to renew their key or expire", "dead.storage"
            )
            await young.wait_ready()


async def test_a_restart_of_nats_is_no_sign_of_life(own_nats: NatsServer) -> None:
    async with joined(own_nats) as here:
        await here.buckets.live.put(liveness_key("dead", "storage"), live("98.0.0"))
        view = CompatibleLiveMirror(VERSION)
        following = asyncio.create_task(follow_forever(here.nats, view))
        await view.wait_loaded(30)
        seen = here.nats.reconnects.count
        own_nats.restart()
        await here.nats.reconnects.wait_after(seen)
        await here.buckets.live.put(liveness_key("other", "storage"), live(VERSION))

        async def followed() -> bool:
            return view.get(liveness_key("other", "storage"), LivenessRecord) is not None

        await eventually(followed, "the view follows again", 60)
        assert [other.renewals for other in view.incompatible.values()] in ([0], [])
        following.cancel()


async def test_two_partitions_that_meet_again_both_stay(own_nats: NatsServer, tmp_path: Path) -> None:
    async with joined(own_nats) as here, toy(tmp_path, own_nats, "here") as service:
        await service.wait_ready()
        renewing = await beating(here, liveness_key("there", "storage"), live("98.0.0"))
        view = CompatibleLiveMirror(VERSION)
        following = asyncio.create_task(follow_forever(here.nats, view))
        await view.wait_loaded(30)

        async def sees_only_own_version() -> bool:
            return (
                "there.storage" in view.incompatible
                and view.get(liveness_key("here", "storage"), LivenessRecord) is not None
            )

        await eventually(sees_only_own_version, "both are there, one is ignored")
        assert service.running
        renewing.cancel()
        following.cancel()
