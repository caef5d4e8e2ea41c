"""What `shoal up` is going to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shoal_cli.node.node_plan import (
    NodePlan,
    UpOptions,
    check_nats_url,
    make_plan,
    nats_spec,
    service_spec,
    without_token,
)
from shoal_common.errors import BadInput, Refused
from shoal_common.names import SERVICES

SECRET = "0123456789abcdef"


def plan(
    environ: dict[str, str] | None = None,
    settings: dict[str, Any] | None = None,
    is_member: bool = False,
    values: dict[str, Any] | None = None,
    added: dict[str, list[str]] | None = None,
    **node_values: Any,
) -> NodePlan:
    options = UpOptions(home="/h", node_values=node_values, values=values or {}, added=added or {})
    return make_plan(options, environ or {}, settings or {}, "node-a", is_member)


def test_I12_the_hubs_token_reaches_the_fetcher_and_nobody_else() -> None:
    environ = {"HF_TOKEN": "hf_1", "HUGGING_FACE_HUB_TOKEN": "hf_2", "PATH": "/bin"}
    for service in SERVICES:
        given = service_spec(plan(), service, ["nats://x:1"], 8080, "python", environ).environ
        assert ("hf_1" in given.values() or "hf_2" in given.values()) == (service == "fetcher")
        assert given["PATH"] == "/bin"
    assert "hf_1" not in nats_spec(Path("n"), Path("c"), environ).environ.values()


def test_services_receive_home_nats_bind_port_hub_and_storage() -> None:
    made = plan(bind="127.0.0.1", hub="http://hub")
    given = service_spec(
        made, "storage", ["nats://a:1", "nats://b:2"], 99, "py", {"NOTIFY_SOCKET": "s", "SHOAL_LOG": "debug"}
    )
    assert given.argv == ["py", "-P", "-m", "shoal_storage"]
    assert given.directory == "/h/run"
    assert given.environ == {
        "SHOAL_HOME": "/h",
        "SHOAL_NATS": "nats://a:1,nats://b:2",
        "SHOAL_BIND": "127.0.0.1",
        "SHOAL_GATEWAY_PORT": "99",
        "SHOAL_LOG": "debug",
        "HF_ENDPOINT": "http://hub",
        "PYTHONUNBUFFERED": "1",
    }


def test_storage_flags_go_to_the_file_unless_the_environment_has() -> None:
    assert plan().changes == {}
    assert plan(values={"max_storage_bytes": 5}).changes == {"storage": {"max_storage_bytes": 5}}
    both = {"max_storage_bytes": None, "eviction_policy": "lru"}
    assert plan(values=both).changes == {"storage": both}
    assert plan(added={"libraries": ["/x"]}).changes == {"storage": {"libraries": ["/x"]}}
    saved = {"storage": {"libraries": ["/nas", "/x"]}}
    added = plan(settings=saved, added={"libraries": ["/x", "/y"]})
    assert added.changes == {"storage": {"libraries": ["/nas", "/x", "/y"]}}
    assert plan(settings=saved).changes == {}
    with pytest.raises(BadInput, match="expected a list of at most 64 directories"):
        plan(settings={"storage": {"libraries": "/nas"}}, added={"libraries": ["/x"]})
    environ = {"SHOAL_MAX_STORAGE_BYTES": "7"}
    assert plan(environ, values={"eviction_policy": "lru"}).changes == {"storage": {"eviction_policy": "lru"}}
    assert service_spec(plan(environ), "storage", [], 1, "py", environ).environ["SHOAL_MAX_STORAGE_BYTES"] == "7"
    with pytest.raises(Refused, match="SHOAL_MAX_STORAGE_BYTES is set and wins"):
        plan(environ, values={"max_storage_bytes": 5})


def test_servers_to_join_come_from_flag_environment_then_file() -> None:
    in_file = {"nats": ["nats://file:1"]}
    assert plan(environ={"SHOAL_NATS": "env:2, env:3"}, settings=in_file, nats=["flag"]).joins == ["nats://flag:4222"]
    assert plan(environ={"SHOAL_NATS": "env:2, env:3"}, settings=in_file).joins == ["nats://env:2", "nats://env:3"]
    assert plan(settings=in_file).joins == ["nats://file:1"]
    assert plan().runs_nats


def test_what_up_was_told_is_kept_and_holds_until_said_again() -> None:
    kept: dict[str, Any] = {
        "bind": "0.0.0.0",
        "gateway_port": 9000,
        "nats_port": 9001,
        "without": ["gateway"],
        "hub": "http://hub",
    }
    first = plan(**kept)
    assert first.changes == {"node": kept}
    again = plan(settings=dict(first.changes))
    assert again.changes == {}
    assert (again.bind, again.gateway_port, again.nats_port, again.hub) == ("0.0.0.0", 9000, 9001, "http://hub")
    assert again.services == [s for s in SERVICES if s != "gateway"] == first.services
    changed = plan(settings=dict(first.changes), gateway_port=7, without=[], bind=None)
    assert (changed.gateway_port, changed.bind, changed.services) == (7, "127.0.0.1", list(SERVICES))
    assert changed.changes == {"node": {"gateway_port": 7, "without": None, "bind": None}}


def test_an_option_wins_over_the_environment_and_the_file() -> None:
    kept, environ = {"node": {"bind": "0.0.0.0", "hub": "http://kept"}}, {"SHOAL_BIND": "127.0.0.2"}
    assert plan(environ, kept, bind="127.0.0.3").bind == "127.0.0.3"
    assert plan(environ, kept).bind == "127.0.0.2"
    assert plan({}, kept).hub == "http://kept"
    assert plan({"HF_ENDPOINT": "http://env"}, kept).hub == "", "the services inherit it"
    with pytest.raises(BadInput, match=r"node.without in node.toml is .*storage, fetcher"):
        plan(settings={"node": {"without": ["gatway"]}})


def test_servers_given_without_membership_are_kept() -> None:
    assert plan(nats=["far"]).changes == {"node": {"nats": ["nats://far:4222"]}}
    assert plan(settings={"node": {"nats": ["nats://far:4222"]}}).joins == ["nats://far:4222"]
    assert plan(settings={"node": {"nats": ["nats://far:4222"]}}, nats=None).runs_nats
    joined = {"cluster": {"nats": ["tls://far:1"]}}
    moved = plan(settings=joined, is_member=True, nats=["tls://moved:1"])
    assert (moved.joins, moved.changes) == (["tls://moved:1"], {"cluster": {"nats": ["tls://moved:1"]}})
    with pytest.raises(Refused, match="shoal leave"):
        plan(settings=joined, is_member=True, nats=None)


def test_only_nats_is_of_one_run() -> None:
    options = UpOptions(home="/h", only_nats=True)
    only = make_plan(options, {}, {}, "node-a", False)
    assert (only.services, only.changes) == ([], {})


def test_I12_to_join_beyond_loopback_a_node_must_be_a_member() -> None:
    assert plan(bind="0.0.0.0").runs_nats  # its own cluster, which it makes
    with pytest.raises(BadInput, match="shoal join"):
        plan(bind="0.0.0.0", nats=["nats://far:4222"])
    assert plan(nats=["nats://far:4222"]).bind == "127.0.0.1"


def test_a_node_that_joined_other_machines_is_reachable_by_them() -> None:
    joined = {"cluster": {"nats": ["tls://far:4222"]}}
    assert plan(settings=joined, is_member=True).bind == "0.0.0.0"
    assert plan(settings=joined, is_member=True, bind="127.0.0.1").bind == "127.0.0.1"
    assert plan(settings={"cluster": {"nats": ["tls://127.0.0.1:4222"]}}, is_member=True).bind == "127.0.0.1"
    assert plan(settings={**joined, "nats": ["nats://file:1"]}, is_member=True).joins == ["tls://far:4222"]


def test_a_secret_of_an_older_version_is_refused_by_name() -> None:
    with pytest.raises(Refused, match="SHOAL_SECRET does nothing any more"):
        plan(environ={"SHOAL_SECRET": SECRET})


def test_programs_can_be_replaced_in_the_settings_file() -> None:
    made = plan(settings={"commands": {"storage": ["strace", "it"]}})
    assert service_spec(made, "storage", [], 1, "py", {}).argv == ["strace", "it"]


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"nats": "nats://not-a-list"}, {}),
        ({"commands": {"storage": "not a list"}}, {}),
        ({"commands": {"storage": []}}, {}),
        ({"commands": {"rm": ["rm"]}}, {}),
        ({}, {"nats": ["http://x"]}),
        ({}, {"nats": ["nats://x:port"]}),
        ({}, {"nats": ["nats://"]}),
        ({}, {"bind": "everywhere"}),
        ({}, {"without": list(SERVICES), "nats": ["nats://x:1"]}),
    ],
)
def test_what_cannot_be_run_is_refused_with_a_reason(settings: dict[str, Any], options: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        plan(settings=settings, **options)


def test_a_refused_url_is_quoted_without_its_secret() -> None:
    with pytest.raises(BadInput) as refused:
        check_nats_url(f"ftp://{SECRET}@x")
    assert SECRET not in refused.value.message


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("nats://x:1", "nats://x:1"),
        ("nats://t@x:1", "nats://x:1"),
        ("nats://u:p@x:1", "nats://x:1"),
        ("nats://t@[::1]:1", "nats://[::1]:1"),
    ],
)
def test_urls_are_shown_without_credentials(url: str, shown: str) -> None:
    assert without_token(url) == shown
