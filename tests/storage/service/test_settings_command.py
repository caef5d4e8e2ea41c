"""A node's storage settings: changed in the file and at once, kept over restarts, overridden by the environment."""

from __future__ import annotations

import asyncio
import tomllib
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from shoal_common.bus import subjects
from shoal_common.errors import BadInput, QuotaExceeded, Refused
from shoal_common.messages import decode, encode
from shoal_common.messages.envelope import Outcome
from shoal_common.messages.storage import Configure, Reload
from shoal_common.settings.node import StorageSettings
from shoal_storage.settings import requested_changes, settings_warning
from tests.harness.fresh import Fresh
from tests.harness.nats import NatsServer
from tests.harness.process import node_environment, started
from tests.storage.running_storage import Node, on_node
from tests.storage.store_fixtures import Model

FILE = (
    '# the name\nid = "{}"\n\n[storage]  # the disk\n# half of it\nmax_storage_bytes = 1000  # small\n\n[gateway]\n'
)
FREE = {"SHOAL_HEADROOM_BYTES": ""}
"""Without the harness's own headroom setting."""


async def configure(node: Node, command: Configure | Mapping[str, object]) -> Outcome:
    """Send `configure` with `nats req` and return its outcome."""
    subject = subjects.command("storage", node.node, "configure")
    body = encode(command) if isinstance(command, Configure) else msgspec.json.encode(command)
    return decode((await node.here.client.request(subject, body, timeout=20)).data, Outcome)


def with_file(node: Node) -> Path:
    """Give a node a settings file as a person has written it."""
    path = node.home / "node.toml"
    path.write_text(FILE.format(node.node))
    return path


async def test_a_changed_quota_applies_at_once_and_survives_a_kill(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, apples: Model
) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node:
        path = with_file(node)
        async with node.storage(**FREE) as process:
            with pytest.raises(QuotaExceeded):
                await node.reserve(apples.manifest)
            change = Configure(max_storage_bytes=10_000, eviction_policy="lru", headroom_bytes=7)
            outcome = await configure(node, change)
            assert outcome.ok, outcome.error
            assert outcome.result == {
                "max_storage_bytes": 10_000,
                "eviction_policy": "lru",
                "headroom_bytes": 7,
                "partial_retention_s": 604800,
                "libraries": [],
                "volumes": [],
                "max_upload_bytes_per_s": None,
                "max_hub_bytes_per_s": None,
                "max_peer_bytes_per_s": None,
                "used_bytes": 0,
                "overridden_by_env": [],
            }
            assert (await configure(node, Configure(headroom_bytes=7))).ok, "changes nothing, so it is no event"
            assert [(name, event["settings"]) for name, event in await node.events()] == [
                (
                    "settings_changed",
                    {"max_storage_bytes": 10_000, "eviction_policy": "lru", "headroom_bytes": 7},
                )
            ]
            await node.reserve(apples.manifest)
            state = await node.storage_state()
            assert (state.quota_bytes, state.eviction_policy, state.headroom_bytes) == (10_000, "lru", 7)
            assert path.read_text() == (
                f'# the name\nid = "{node.node}"\n\n[storage]  # the disk\n# half of it\n'
                'max_storage_bytes = 10000  # small\nheadroom_bytes = 7\neviction_policy = "lru"\n\n[gateway]\n'
            )
            await process.kill()
        async with node.storage(**FREE):
            state = await node.storage_state()
            assert (state.quota_bytes, state.eviction_policy, state.headroom_bytes) == (10_000, "lru", 7)
            assert (await configure(node, Configure(max_storage_bytes=None))).result["max_storage_bytes"] is None
            state = await node.storage_state()
            assert (state.quota_bytes, state.eviction_policy) == (None, "lru"), "what is left out stays"
        assert "# small" in path.read_text() and "max_storage_bytes" not in path.read_text()


async def test_a_quota_below_the_used_bytes_is_accepted_with_a_warning(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, apples: Model, pears: Model
) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.storage(**FREE):
        await configure(node, Configure(headroom_bytes=0))
        await node.bring_in(apples)
        outcome = await configure(node, Configure(max_storage_bytes=5))
        assert outcome.ok and "more than the quota of 5 B: nothing is removed" in outcome.result["note"]
        assert await node.model_state(apples) is not None
        with pytest.raises(QuotaExceeded):
            await node.reserve(pears.manifest)


async def test_environment_settings_win_are_published_and_not_changed(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    environ = {"SHOAL_MAX_STORAGE_BYTES": "900", "SHOAL_EVICTION_POLICY": "lru", **FREE}
    async with on_node(nats, tmp_path, fresh("storage")) as node:
        path = with_file(node)
        before = path.read_text()
        async with node.storage(**environ):
            state = await node.storage_state()
            assert (state.quota_bytes, state.eviction_policy) == (900, "lru")
            assert state.overridden_by_env == ["max_storage_bytes", "eviction_policy"]
            outcome = await configure(node, Configure(max_storage_bytes=5, headroom_bytes=6))
            assert outcome.error is not None and outcome.error.code == "refused"
            assert "unset SHOAL_MAX_STORAGE_BYTES" in outcome.error.message
            assert (await node.storage_state()) == state and path.read_text() == before, "all or nothing"
            outcome = await configure(node, Configure(headroom_bytes=6))
            assert outcome.ok and outcome.result["overridden_by_env"] == ["max_storage_bytes", "eviction_policy"]
            assert (await node.storage_state()).headroom_bytes == 6


async def test_bad_values_are_refused_and_nothing_is_written(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node:
        path = with_file(node)
        before = path.read_text()
        async with node.storage(**FREE) as process:
            state = await node.storage_state()
            for body, expected in (
                ({"max_storage_bytes": -1}, "max_storage_bytes is -1"),
                ({"headroom_bytes": -5}, "headroom_bytes is -5"),
                ({"headroom_bytes": None}, "headroom_bytes"),
                ({"headroom_bytes": 2**63}, "headroom_bytes is"),
                ({"max_storage_bytes": "200GB"}, "max_storage_bytes"),
                ({"max_storage_bytes": True}, "max_storage_bytes"),
                ({"eviction_policy": "fifo"}, "eviction_policy"),
                ({"eviction_policy": "lru", "headroom_bytes": 1.5}, "headroom_bytes"),
                ({}, "nothing to change"),
            ):
                outcome = await configure(node, body)
                assert outcome.error is not None and outcome.error.code in ("bad_input", "bad_message"), body
                assert expected in outcome.error.message and "\n" not in outcome.error.message, body
            # A mistake that somebody makes in the file while storage runs is not overwritten.
            path.write_text(f'id = "{node.node}"\n[storage]\nmax_storage_bytes = "lots"\n')
            broken = await configure(node, Configure(headroom_bytes=5))
            assert broken.error is not None
            assert "storage.max_storage_bytes in node.toml is 'lots'" in broken.error.message
            assert "headroom" not in path.read_text()
            path.write_text("[storage\n")
            unreadable = await configure(node, Configure(headroom_bytes=5))
            assert unreadable.error is not None and "node.toml cannot be read" in unreadable.error.message
            path.write_text(before)
            assert await node.storage_state() == state
            assert "Traceback" not in process.output


async def test_rates_go_into_their_own_section_all_or_none(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node:
        path = with_file(node)
        async with node.storage(SHOAL_MAX_PEER_BYTES_PER_S="77", **FREE):
            change = Configure(headroom_bytes=7, max_hub_bytes_per_s=20_000_000, max_upload_bytes_per_s=None)
            outcome = await configure(node, change)
            assert outcome.ok and outcome.result["max_hub_bytes_per_s"] == 20_000_000
            assert tomllib.loads(path.read_text())["transfer"] == {"max_hub_bytes_per_s": 20_000_000}
            assert "# half of it" in path.read_text()
            state = await node.storage_state()
            rates = (state.max_upload_bytes_per_s, state.max_hub_bytes_per_s, state.max_peer_bytes_per_s)
            assert rates == (None, 20_000_000, 77) and state.overridden_by_env == ["max_peer_bytes_per_s"]
            before = path.read_text()
            for body, expected in (
                ({"headroom_bytes": 8, "max_hub_bytes_per_s": 0}, "bytes per second from 1"),
                ({"headroom_bytes": 8, "max_peer_bytes_per_s": 5}, "unset SHOAL_MAX_PEER_BYTES_PER_S"),
                ({"headroom_bytes": 8, "max_upload_bytes_per_s": 2**63}, "max_upload_bytes_per_s is"),
            ):
                refused = await configure(node, body)
                assert refused.error is not None and expected in refused.error.message
            assert path.read_text() == before and await node.storage_state() == state, "all or none"
            # A mistake in one section refuses a change of the other.
            path.write_text(before.replace("20000000", '"fast"'))
            broken = await configure(node, Configure(headroom_bytes=9))
            assert broken.error is not None
            assert "transfer.max_hub_bytes_per_s in node.toml is 'fast'" in broken.error.message
            path.write_text(before)
            assert (await configure(node, Configure(max_hub_bytes_per_s=None))).ok
            assert (await node.storage_state()).max_hub_bytes_per_s is None


async def test_concurrent_settings_changes_all_apply(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.storage(**FREE):
        changes = (Configure(max_storage_bytes=11), Configure(eviction_policy="lru"), Configure(headroom_bytes=3))
        assert all(o.ok for o in await asyncio.gather(*(configure(node, c) for c in changes)))
        state = await node.storage_state()
        assert (state.quota_bytes, state.eviction_policy, state.headroom_bytes) == (11, "lru", 3)


@pytest.mark.parametrize(
    ("toml", "environ", "expected"),
    [
        ("[storage\n", {}, "node.toml cannot be read"),
        ("[storage]\neviction_policy = 'fifo'\n", {}, "storage.eviction_policy in node.toml is 'fifo'"),
        ("", {"SHOAL_EVICTION_POLICY": "LRU"}, "SHOAL_EVICTION_POLICY is 'LRU'"),
        ("[storage]\nheadroom_bytes = -1\n", {}, "storage.headroom_bytes in node.toml is -1"),
    ],
)
async def test_a_malformed_file_ends_the_start_with_one_clear_line(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, toml: str, environ: dict[str, str], expected: str
) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node:
        (node.home / "node.toml").write_text(f'id = "{node.node}"\n{toml}')
        environment = node_environment(node.home, nats.url, **environ)
        async with started("-m", "shoal_storage", environment=environment) as process:
            assert await process.wait_exit() == 2
            assert len([line for line in process.lines if expected in line]) == 1
            assert "Traceback" not in process.output


def test_only_given_settings_change_and_null_removes_the_quota() -> None:
    assert requested_changes(Configure(max_storage_bytes=None), {}) == {"max_storage_bytes": None}
    assert requested_changes(Configure(headroom_bytes=0), {}) == {"headroom_bytes": 0}
    with pytest.raises(Refused, match="unset SHOAL_EVICTION_POLICY"):
        requested_changes(Configure(eviction_policy="lru"), {"SHOAL_EVICTION_POLICY": "lru"})
    with pytest.raises(BadInput, match="nothing to change"):
        requested_changes(Configure(), {})


def test_a_settings_warning_is_given_only_when_needed() -> None:
    fits = StorageSettings(100, 10)
    assert settings_warning(fits, 60, 40, 10) == ""
    assert "until models are removed" in settings_warning(fits, 60, 41, 10)
    assert "new downloads evict models first" in settings_warning(StorageSettings(100, 10, "lru"), 101, 0, 10)
    assert "9 B free, less than the headroom of 10 B" in settings_warning(StorageSettings(None, 10), 0, 0, 9)


async def test_I12_directories_are_set_in_the_nodes_file_alone(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    async with on_node(nats, tmp_path, fresh("storage")) as node:
        path = with_file(node)
        async with node.storage(**FREE):
            before = path.read_text()
            for key, paths in (("libraries", [str(theirs)]), ("volumes", [str(theirs)]), ("libraries", [])):
                outcome = await configure(node, {"headroom_bytes": 5, key: paths})
                assert outcome.error is not None and outcome.error.code == "refused", key
                assert "only its owner" in outcome.error.message
            state = await node.storage_state()
            assert path.read_text() == before and not state.libraries and not state.volumes
            applied = await node.set_directories(libraries=[theirs])
            assert applied.ok and applied.result["libraries"] == [str(theirs)]
            assert (await node.storage_state()).libraries[0].path == str(theirs)


async def test_a_settings_file_that_cannot_be_used_changes_nothing(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with on_node(nats, tmp_path, fresh("storage")) as node:
        path = with_file(node)
        async with node.storage(**FREE):
            state = await node.storage_state()
            for text, expected in (
                ("[storage]\nheadroom_bytes = -1\n", "headroom_bytes"),
                ("[stor", "cannot be read"),
            ):
                path.write_text(text)
                outcome = await node.command("reload", Reload())
                assert outcome.error is not None and expected in outcome.error.message
            assert (await node.storage_state()).headroom_bytes == state.headroom_bytes
