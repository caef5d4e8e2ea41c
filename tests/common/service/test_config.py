"""Configuration: the node's id is created once, and nothing listens beyond loopback without a credential."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from shoal_common.config import ensure_node_id, read_config
from shoal_common.errors import BadInput, BadName, Refused
from shoal_common.host.interfaces import read_interfaces
from tests.harness.identities import Authority
from tests.harness.modes import make_wrong
from tests.harness.process import node_environment, started

ASK_FOR_ID = """
import pathlib, sys
from shoal_common.config import ensure_node_id
print("id", ensure_node_id(pathlib.Path(sys.argv[1])))
"""


def environment(home: Path, **more: str) -> dict[str, str]:
    return {"SHOAL_HOME": str(home), **more}


def test_I8_a_node_id_is_made_once_and_kept(tmp_path: Path) -> None:
    first = ensure_node_id(tmp_path / "home")
    assert re.fullmatch(r"[a-z0-9-]+-[0-9a-f]{4}", first)
    assert ensure_node_id(tmp_path / "home") == first
    assert read_config("storage", environment(tmp_path / "home")).node == first


def test_I8_a_given_node_id_is_used_at_first_only(tmp_path: Path) -> None:
    assert ensure_node_id(tmp_path, "workshop") == "workshop"
    assert ensure_node_id(tmp_path, "another") == "workshop"


def test_I8_a_persons_settings_stay_when_the_id_is_added(tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text('# mine\n[storage]\npath = "/models"\n')
    node = ensure_node_id(tmp_path)
    config = read_config("storage", environment(tmp_path))
    assert config.node == node
    assert config.store == Path("/models")
    assert "# mine" in (tmp_path / "node.toml").read_text()


def test_I6_a_kill_between_write_and_rename_leaves_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "node.toml.new").write_text('id = "half-wri')
    node = ensure_node_id(tmp_path)
    assert ensure_node_id(tmp_path) == node


async def test_I8_services_that_start_together_agree_on_one_node_id(tmp_path: Path) -> None:
    async def ask() -> str:
        async with started("-c", ASK_FOR_ID, str(tmp_path / "home"), environment=node_environment(tmp_path, "")) as p:
            assert await p.wait_exit() == 0, p.output
            return await p.wait_line("id ")

    answers = await asyncio.gather(*(ask() for _ in range(6)))
    assert len(set(answers)) == 1
    assert answers[0] == f"id {ensure_node_id(tmp_path / 'home')}"


def test_I8_a_home_that_lost_its_id_is_no_new_node(tmp_path: Path) -> None:
    ensure_node_id(tmp_path, "workshop")
    path = tmp_path / "node.toml"
    path.write_text("")
    with pytest.raises(
        Refused, match=r"node.toml has no id, but this is the home of node workshop: put .* `shoal up"
    ):
        ensure_node_id(tmp_path)
    path.unlink()
    with pytest.raises(Refused, match=r"node.toml is missing, but this is the home of node workshop"):
        ensure_node_id(tmp_path, "other")
    assert not path.exists()
    assert ensure_node_id(tmp_path, "workshop") == ensure_node_id(tmp_path) == "workshop"


def test_I8_a_home_with_a_store_and_no_id_is_no_new_node(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "VERSION").write_text("1")
    with pytest.raises(Refused, match=r"node.toml is missing, but .*/store is the store of a node"):
        ensure_node_id(tmp_path)
    assert ensure_node_id(tmp_path, "workshop") == "workshop"


def test_I8_an_id_that_a_person_changes_is_the_nodes_id(tmp_path: Path) -> None:
    ensure_node_id(tmp_path, "workshop")
    (tmp_path / "node.toml").write_text('id = "attic"\n')
    assert ensure_node_id(tmp_path) == "attic"
    (tmp_path / "node.toml").write_text("")
    with pytest.raises(Refused, match="the home of node attic"):
        ensure_node_id(tmp_path)


@pytest.mark.parametrize("kind", ["directory", "fifo", "bytes"])
@pytest.mark.parametrize("name", ["node.toml", "node.id"])
def test_a_home_with_a_file_of_the_wrong_kind_names_it(tmp_path: Path, name: str, kind: str) -> None:
    make_wrong(tmp_path / name, kind)
    with pytest.raises(BadInput, match=f"{name} cannot be read"):
        ensure_node_id(tmp_path)


@pytest.mark.parametrize("name", ["", "log", "run", "nats", "store"])
def test_a_file_in_a_directorys_place_is_named(tmp_path: Path, name: str) -> None:
    home = tmp_path / "home"
    (home if name else tmp_path).mkdir(exist_ok=True)
    (home / name).write_text("x")
    with pytest.raises(BadInput, match=f"{home / name} is a file"):
        read_config("storage", environment(home))


async def test_a_service_without_a_home_ends_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for home in (tmp_path / "file", tmp_path / "file" / "below"):
        async with started("-m", "shoal_storage", environment=node_environment(home, "")) as p:
            assert await p.wait_exit() == BadInput.exit_code
            assert p.output.count("\n") == 0 and p.output.startswith(f"shoal storage: {tmp_path / 'file'} is a file")


@pytest.mark.parametrize("text", ['id = "', 'id = "UPPER"', 'id = ""', "id = 7.5", 'id = "any"'])
def test_I10_a_settings_file_with_a_fault_is_refused_naming_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "node.toml").write_text(text)
    with pytest.raises(BadInput) as refusal:
        read_config("storage", environment(tmp_path))
    assert "node.toml" in refusal.value.message or isinstance(refusal.value, BadName)


@pytest.mark.parametrize("bind", ["0.0.0.0", "::", "10.1.2.3"])
def test_I12_beyond_loopback_nothing_starts_without_an_identity(tmp_path: Path, bind: str) -> None:
    given = {"SHOAL_BIND": bind, "SHOAL_SECRET": "opens nothing"}
    with pytest.raises(BadInput, match="without an identity"):
        read_config("fileserver", environment(tmp_path / "a", **given))
    Authority(tmp_path).node("a")
    assert read_config("fileserver", environment(tmp_path / "a", **given)).bind == bind


@pytest.mark.parametrize("bind", ["127.0.0.1", "::1", "localhost"])
def test_on_loopback_no_identity_is_needed(tmp_path: Path, bind: str) -> None:
    config = read_config("storage", environment(tmp_path, SHOAL_BIND=bind))
    assert config.identity is None
    (link,) = config.links(7000, [])
    assert link.address in ("127.0.0.1:7000", "[::1]:7000") and link.kind == "loopback"


@pytest.mark.parametrize(
    "more",
    [{"SHOAL_BIND": "everywhere"}, {"SHOAL_REPLICAS": "many"}, {"SHOAL_REPLICAS": "0"}, {"SHOAL_LOG": "chatty"}],
)
def test_a_setting_that_cannot_be_is_refused_by_name(tmp_path: Path, more: dict[str, str]) -> None:
    (value,) = more.values()
    with pytest.raises(BadInput, match=value):
        read_config("storage", environment(tmp_path, **more))


def test_peers_get_the_advertised_addresses_or_the_interfaces(tmp_path: Path) -> None:
    Authority(tmp_path).node("a")
    given = environment(tmp_path / "a", SHOAL_BIND="0.0.0.0")
    here = read_interfaces()
    config = read_config("storage", given | {"SHOAL_ADVERTISE": "10.0.0.9, fd00::9"})
    assert [link.address for link in config.links(7000, here)] == ["10.0.0.9:7000", "[fd00::9]:7000"]
    found = [link.address for link in read_config("storage", given).links(7000, here)]
    assert found and all(a.endswith(":7000") and not a.startswith("0.0.0.0") for a in found)


def test_servers_of_a_cluster_are_read_as_a_list(tmp_path: Path) -> None:
    config = read_config("storage", environment(tmp_path, SHOAL_NATS="nats://a:4222, nats://b:4222,"))
    assert config.nats == ["nats://a:4222", "nats://b:4222"]
