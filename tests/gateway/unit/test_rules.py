"""The gateway's pure modules: stop strings, token order, access, instance and node selection. No I/O."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_common import VERSION
from shoal_common.bus.keys import MEMBERS_KEY
from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.errors import BY_CODE, ErrorBody, NodeDown, NotFound, StageLost
from shoal_common.http.errors import BodyTooSlow, CrossOriginForbidden, HeadTooLarge, TooLarge
from shoal_common.liveness.compatibility import CompatibleLiveMirror
from shoal_common.messages import encode
from shoal_common.messages.downloads import DownloadState
from shoal_common.messages.generation import TokenEvent
from shoal_common.messages.instances import InstanceSpec, InstanceState, StageSpec, StageState
from shoal_common.messages.liveness import LivenessRecord, ProcessIdentity
from shoal_common.messages.placement import MembersState
from shoal_common.messages.storage import ModelState
from shoal_gateway.app import ROUTES
from shoal_gateway.cluster.snapshot import ClusterSnapshot, take_snapshot
from shoal_gateway.cluster.status_view import instance_view
from shoal_gateway.errors import UnsupportedParameter
from shoal_gateway.generation.instance_selection import lost_stage_reason, select_instance
from shoal_gateway.generation.openai import UNSUPPORTED
from shoal_gateway.generation.token_stream import MAX_TOKENS_AHEAD, StopScanner, TokenReorderBuffer
from shoal_gateway.rest.downloads import has_started
from shoal_gateway.rest.node_selection import select_control_nodes, select_delete_nodes, select_download_nodes

HTTP_CODES = [e.code for e in (CrossOriginForbidden, TooLarge, HeadTooLarge, BodyTooSlow)]
few_letters = st.text(alphabet="ab", max_size=30)
stop_lists = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=4)


def test_error_codes_of_http_are_its_own() -> None:
    codes = [*HTTP_CODES, UnsupportedParameter.code]
    assert len(set(codes)) == len(codes) and not set(codes) & set(BY_CODE)


def scanned(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    """Return the text sent for these pieces, and whether a stop string ended it."""
    scanner = StopScanner(stops)
    shown = "".join(scanner.push(p) for p in pieces)
    return shown + scanner.flush(), scanner.stopped


@given(few_letters, stop_lists, st.data())
def test_any_split_of_a_text_shows_the_same(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert scanned(pieces, stops) == scanned(list(text), stops) == scanned([text], stops)


@given(few_letters, stop_lists)
def test_shown_text_is_a_beginning_without_any_stop_string(text: str, stops: list[str]) -> None:
    shown, stopped = scanned(list(text), stops)
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    assert stopped == any(stop in text for stop in stops)
    assert stopped or shown == text


@given(few_letters, stop_lists)
def test_only_what_may_begin_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    scanner = StopScanner(stops)
    shown = "".join(scanner.push(c) for c in text)
    held = text[len(shown) :]
    assert scanner.stopped or held == "" or any(s.startswith(held) for s in stops)


@given(
    st.integers(0, 12).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, max(n - 1, 0)), max_size=20)))
)
def test_tokens_in_any_order_come_out_once_and_in_order(case: tuple[int, list[int]]) -> None:
    count, noise = case
    order = TokenReorderBuffer()
    arrivals = [i for i in noise if i < count] + list(range(count))
    out = [e.index for i in arrivals for e in order.push(TokenEvent(request="r", index=i))]
    assert out == list(range(count)) and not order.has_gap


@given(st.sets(st.integers(0, 10)))
def test_nothing_passes_a_gap(indices: set[int]) -> None:
    order = TokenReorderBuffer()
    out = [e.index for i in indices for e in order.push(TokenEvent(request="r", index=i))]
    missing = min(set(range(12)) - indices)
    assert out == list(range(missing))
    assert order.has_gap == any(i > missing for i in indices)


def test_I7_tokens_kept_ahead_are_bounded() -> None:
    order = TokenReorderBuffer()
    assert order.push(TokenEvent(request="r", index=MAX_TOKENS_AHEAD)) == [] and not order.has_gap
    assert order.push(TokenEvent(request="r", index=-1)) == [] and not order.has_gap


def test_error_passes_a_gap() -> None:
    order = TokenReorderBuffer()
    order.push(TokenEvent(request="r", index=5))
    error = TokenEvent(request="r", error=ErrorBody(code="busy", message="full"))
    assert order.push(error) == [error]


def live(*names: str) -> dict[str, dict[str, LivenessRecord]]:
    """Return live services from names like `node.service`."""
    out: dict[str, dict[str, LivenessRecord]] = {}
    for name in names:
        node, _, service = name.partition(".")
        out.setdefault(node, {})[service] = LivenessRecord(
            holder=ProcessIdentity(uid="u", host="h", pid=1), version=VERSION
        )
    return out


def spec(identity: str, *nodes: str, commit: str = "c" * 40, epoch: int = 1) -> InstanceSpec:
    """Return an instance of org/m with a layer on each node."""
    stages = [StageSpec(rank=i, node=n, first_layer=i, last_layer=i + 1) for i, n in enumerate(nodes)]
    return InstanceSpec(id=identity, repo="org/m", commit=commit, stages=stages, context_tokens=8, epoch=epoch)


def snapshot_of(*specs: InstanceSpec, nodes: tuple[str, ...] = ("a", "b")) -> ClusterSnapshot:
    """Return a snapshot in which all of these are ready."""
    return ClusterSnapshot(
        live=live(*(f"{n}.inference" for n in nodes)),
        specs={s.id: s for s in specs},
        instances={
            s.id: InstanceState(id=s.id, repo=s.repo, commit=s.commit, phase="ready", nodes=[]) for s in specs
        },
        stages={
            s.id: {
                t.rank: StageState(instance=s.id, rank=t.rank, node=t.node, epoch=s.epoch, phase="ready")
                for t in s.stages
            }
            for s in specs
        },
    )


def test_model_may_be_named_by_repo_by_commit_and_by_instance() -> None:
    cluster = snapshot_of(spec("one", "a", commit="1" * 40), spec("two", "b", commit="2" * 40))
    assert select_instance(cluster, "org/m", {"one": 1}).id == "two"
    assert select_instance(cluster, f"org/m@{'1' * 40}", {"one": 1}).id == "one"
    assert select_instance(cluster, "one", {"one": 1}).id == "one"
    with pytest.raises(NotFound):
        select_instance(cluster, f"org/m@{'3' * 40}", {})


def test_instance_that_lost_a_stage_is_passed_over() -> None:
    cluster = snapshot_of(spec("one", "away"), spec("two", "b"))
    assert select_instance(cluster, "org/m", {"two": 9}).id == "two"
    with pytest.raises(StageLost, match="away"):
        select_instance(cluster, "one", {})


def test_stage_of_another_epoch_does_not_answer() -> None:
    old = StageState(instance="i", rank=0, node="a", epoch=1, phase="ready")
    assert lost_stage_reason(spec("i", "a", epoch=1), {0: old}, {"a"}) is None
    assert "epoch 1, not 2" in (lost_stage_reason(spec("i", "a", epoch=2), {0: old}, {"a"}) or "")
    assert "not running" in (lost_stage_reason(spec("i", "a"), {}, {"a"}) or "")


def test_a_node_that_is_gone_is_named_before_its_neighbour() -> None:
    linking = StageState(instance="i", rank=0, node="a", epoch=1, phase="linking")
    ready = StageState(instance="i", rank=1, node="b", epoch=1, phase="ready")
    reason = lost_stage_reason(spec("i", "a", "b"), {0: linking, 1: ready}, {"a"}, {"b": 86400.0})
    assert reason == "stage 1 on node b is down: node b is down since 1970-01-02T00:00:00+00:00"


def lacking_b(phase: Any) -> ClusterSnapshot:
    """Return a snapshot of an instance on a and b, in this phase, whose b was killed."""
    ready = snapshot_of(spec("i", "a", "b"), nodes=("a",))
    instances = {"i": msgspec.structs.replace(ready.instances["i"], phase=phase)}
    stages = {"i": {**ready.stages["i"], 0: msgspec.structs.replace(ready.stages["i"][0], phase="linking")}}
    return msgspec.structs.replace(ready, instances=instances, stages=stages, down_since_s={"b": 86400.0})


@pytest.mark.parametrize("phase", ["ready", "degraded", "starting"])
def test_an_instance_without_a_node_shows_and_says_which(phase: str) -> None:
    cluster = lacking_b(phase)
    view = instance_view(cluster, "i")
    assert view is not None and view.phase == ("starting" if phase == "starting" else "degraded")
    assert [(s.phase, s.down_since_s) for s in view.stages] == [("linking", None), ("down", 86400.0)]
    with pytest.raises(StageLost, match="node b is down since 1970-01-02"):
        select_instance(cluster, "org/m", {})


def test_an_outage_of_nats_shows_no_stage_as_down() -> None:
    view = instance_view(snapshot_of(spec("i", "a", "b"), nodes=("a",)), "i")
    assert view is not None and view.phase == "ready" and [s.phase for s in view.stages] == ["ready", "ready"]


def test_a_lost_node_is_not_live_until_a_service_starts() -> None:
    state = KvMirror("state")
    state.replace({MEMBERS_KEY: encode(MembersState(lost_since_s={"a": 0.0, "b": 50.0}))})
    for started_at_s, lost in ((40.0, {"b": 50.0}), (60.0, {})):
        holder = ProcessIdentity(uid="u", host="h", pid=1)
        record = LivenessRecord(holder=holder, version=VERSION, started_at_s=started_at_s)
        live_mirror = CompatibleLiveMirror()
        live_mirror.replace({"b.inference": encode(record)})
        snapshot = take_snapshot(live_mirror, KvMirror("spec"), state)
        assert snapshot.down_since_s == lost
        assert snapshot.live_nodes("inference") == ([] if lost else ["b"])


def test_ended_downloads_on_down_nodes_hold_no_delete_up() -> None:
    def downloads(phase: str) -> list[DownloadState]:
        return [DownloadState(node="away", model="org/m", phase=phase)]  # type: ignore[arg-type]  # as a str

    assert select_delete_nodes(ClusterSnapshot(downloads=downloads("failed")), "org/m", None, None) == []
    with pytest.raises(NodeDown):
        select_delete_nodes(ClusterSnapshot(downloads=downloads("paused")), "org/m", None, None)
    assert select_control_nodes(ClusterSnapshot(downloads=downloads("ready")), "org/m", None) == []


def test_delete_of_a_revision_goes_where_that_revision_is() -> None:
    def held(node: str, commit: str, *revisions: str) -> ModelState:
        return ModelState(
            node=node, repo="org/m", commit=commit, size_bytes=1, file_count=1, revisions=list(revisions)
        )

    cluster = ClusterSnapshot(
        live=live("a.storage", "b.storage"), models=[held("a", "1" * 40, "v1"), held("b", "2" * 40, "main")]
    )
    assert select_delete_nodes(cluster, "org/m", None, None) == ["a", "b"]
    assert select_delete_nodes(cluster, "org/m", "v1", None) == ["a"]
    assert select_delete_nodes(cluster, "org/m", "main", None) == ["b"]
    assert select_delete_nodes(cluster, "org/m", "2" * 40, None) == ["b"]
    assert select_delete_nodes(cluster, "org/x", None, None) == []


def test_download_without_nodes_is_for_this_node() -> None:
    cluster = ClusterSnapshot(live=live("a.fetcher", "b.fetcher"))
    assert select_download_nodes(cluster, None, "a") == ["a"]
    assert select_download_nodes(cluster, "all", "a") == ["a", "b"]
    assert select_download_nodes(cluster, "b", "a") == ["b"]
    assert select_download_nodes(cluster, ["b", "a", "b"], "a") == ["b", "a"]


def test_download_has_started_once_its_node_publishes_new_state() -> None:
    old = DownloadState(node="a", model="org/m", phase="fetching", updated_at_s=5.0)
    assert not has_started(None, None, 10.0)
    assert not has_started(old, old, 10.0)
    assert has_started(old, old, 4.0)
    assert has_started(DownloadState(node="a", model="org/m", phase="fetching", updated_at_s=6.0), old, 10.0)
    assert not has_started(DownloadState(node="a", model="org/m", phase="queued", updated_at_s=11.0), old, 10.0)


def test_every_route_is_documented() -> None:
    root = Path(__file__).parents[3]
    protocol = (root / "docs" / "protocol.md").read_text()
    for route in ROUTES:
        for method in (route.methods or set()) - {"HEAD"}:
            assert f"`{method} {route.path}`" in protocol, (method, route.path)


def test_every_error_code_and_parameter_is_documented() -> None:
    protocol = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text()
    for code in [*BY_CODE, *HTTP_CODES, "unsupported_parameter", "method_not_allowed"]:
        assert f"`{code}`" in protocol, code
    for name in UNSUPPORTED:
        assert f"`{name}`" in protocol, name
