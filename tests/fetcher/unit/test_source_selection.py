"""Holders, sources, failures, and how downloads end: properties rather than examples."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_common.errors import (
    BY_CODE,
    Corrupt,
    Denied,
    Expired,
    HubUnavailable,
    NodeDown,
    NotFound,
    Refused,
    ShoalError,
    Unavailable,
)
from shoal_common.messages.downloads import DownloadState
from shoal_common.messages.manifest import Manifest, ManifestFile
from shoal_common.messages.storage import ModelState
from shoal_fetcher.errors import BlobHashMismatch, RateLimited, ReservationLost
from shoal_fetcher.sources.failure_policy import (
    HUB,
    MAX_PEER_FAILURES,
    MAX_RATE_LIMITED_S,
    UNKNOWN_SOURCE,
    BlobHolder,
    SourceHealth,
)
from shoal_fetcher.sources.source_selection import (
    FetchFromHub,
    FetchFromPeer,
    WaitForOrigin,
    choose_source,
    holders,
    with_known_sha256,
)

COMMIT = "c" * 40
BLOB = "a" * 64
GIT = "git-" + "b" * 40
GIT_SHA256 = "d" * 64
MANIFEST = Manifest(
    repo="org/name",
    commit=COMMIT,
    files=[
        ManifestFile(path="model.safetensors", size_bytes=10, sha256=BLOB),
        ManifestFile(path="config.json", size_bytes=3, git_sha1="b" * 40),
    ],
)
NODES = st.sampled_from(["a", "b", "c", "d"])
FOUND = st.lists(NODES, unique=True).map(lambda nodes: [BlobHolder(n, BLOB) for n in sorted(nodes)])


def model_on(node: str, commit: str = COMMIT) -> ModelState:
    return ModelState(node=node, repo="org/name", commit=commit, size_bytes=13, file_count=2)


def arriving_on(node: str, *blobs: str, known: dict[str, str] | None = None) -> DownloadState:
    return DownloadState(
        node=node, model="org/name", phase="fetching", blobs=list(blobs), sha256_by_git_name=known or {}
    )


def test_a_node_that_has_the_model_holds_its_blobs() -> None:
    assert holders(BLOB, MANIFEST, [model_on("b")], [], ["b"], "a", {}) == [BlobHolder("b", BLOB)]


def test_a_node_with_another_commit_holds_nothing_of_this_one() -> None:
    assert holders(BLOB, MANIFEST, [model_on("b", "e" * 40)], [], ["b"], "a", {}) == []


def test_a_blob_is_there_for_peers_before_its_model_is_ready() -> None:
    assert holders(BLOB, MANIFEST, [], [arriving_on("b", BLOB)], ["b"], "a", {}) == [BlobHolder("b", BLOB)]
    assert holders(BLOB, MANIFEST, [], [arriving_on("b")], ["b"], "a", {}) == []


def test_a_small_file_known_by_git_hash_is_requested_by_sha256() -> None:
    b = arriving_on("b", GIT_SHA256, known={GIT: GIT_SHA256})
    assert holders(GIT, MANIFEST, [model_on("c")], [b], ["b", "c"], "a", {}) == [BlobHolder("b", GIT_SHA256)]


def test_a_hint_names_the_small_files_of_a_node_with_the_model() -> None:
    hints = {GIT: GIT_SHA256}
    assert holders(GIT, MANIFEST, [model_on("c")], [], ["c"], "a", hints) == [BlobHolder("c", GIT_SHA256)]
    assert holders(GIT, MANIFEST, [model_on("c", "e" * 40)], [], ["c"], "a", hints) == []


@given(st.sets(NODES), st.sets(NODES), st.sets(NODES), NODES)
def test_only_live_nodes_other_than_this_one_are_holders(
    ready: set[str], arriving: set[str], live: set[str], me: str
) -> None:
    found = holders(BLOB, MANIFEST, map(model_on, ready), [arriving_on(n, BLOB) for n in arriving], live, me, {})
    assert [h.node for h in found] == sorted((ready | arriving) & live - {me})


@given(FOUND, st.none() | NODES, st.sets(NODES), st.dictionaries(NODES, st.integers(0, 9)))
def test_I9_the_hub_is_used_only_without_a_peer_or_an_origin(
    found: list[BlobHolder], origin: str | None, corrupt: set[str], busy: dict[str, int]
) -> None:
    choice = choose_source(BLOB, found, origin, "me", SourceHealth(banned=corrupt), busy)
    usable = {h.node for h in found} - corrupt
    if usable:
        assert isinstance(choice, FetchFromPeer) and choice.node in usable
        assert busy.get(choice.node, 0) == min(busy.get(n, 0) for n in usable)
    elif origin is not None:
        assert choice == WaitForOrigin(origin)
    else:
        assert choice == FetchFromHub()


def test_a_lease_left_by_this_node_itself_is_nothing_to_wait_for() -> None:
    assert choose_source(BLOB, [], "me", "me", SourceHealth(), {}) == FetchFromHub()


def test_nodes_that_choose_at_once_spread_over_the_holders() -> None:
    found = [BlobHolder(n, BLOB) for n in "abcd"]
    chosen = {choose_source(BLOB, found, None, f"node-{i}", SourceHealth(), {}) for i in range(64)}
    assert {c.node for c in chosen if isinstance(c, FetchFromPeer)} == set("abcd")


def test_a_peer_that_failed_comes_after_all_that_did_not() -> None:
    found = [BlobHolder("a", BLOB), BlobHolder("b", BLOB)]
    health = SourceHealth()
    health.record_failure(Unavailable("gone"), "a")
    assert choose_source(BLOB, found, None, "me", health, {"b": 7}) == FetchFromPeer("b", BLOB)


def test_I9_a_peer_down_for_a_moment_is_retried_before_the_hub() -> None:
    health, found, waited_s = SourceHealth(), [BlobHolder("a", BLOB)], 0.0
    for _ in range(MAX_PEER_FAILURES):
        assert choose_source(BLOB, found, None, "me", health, {}) == FetchFromPeer("a", BLOB)
        waited_s += health.record_failure(Unavailable("refused"), "a")
    assert choose_source(BLOB, found, None, "me", health, {}) == FetchFromHub()
    assert 5.0 < waited_s < 10.0


def test_I1_a_peer_that_sent_wrong_bytes_is_not_used_again() -> None:
    health, found = SourceHealth(), [BlobHolder("a", BLOB)]
    assert health.record_failure(Corrupt("wrong"), "a") == 0.0
    for _ in range(20):
        assert choose_source(BLOB, found, None, "me", health, {}) == FetchFromHub()
        health.record_failure(HubUnavailable("away"), None)


def test_when_the_hub_fails_too_peers_get_another_chance() -> None:
    health, found = SourceHealth(), [BlobHolder("a", BLOB)]
    for _ in range(MAX_PEER_FAILURES):
        health.record_failure(Unavailable("refused"), "a")
    health.record_failure(HubUnavailable("away"), None)
    assert choose_source(BLOB, found, None, "me", health, {}) == FetchFromPeer("a", BLOB)


def test_wrong_bytes_from_the_hub_cost_one_restart_then_fail() -> None:
    health, error = SourceHealth(), Corrupt("wrong")
    assert health.record_failure(error, None) == 0.0
    with pytest.raises(Corrupt):
        health.record_failure(error, None)


def test_I1_no_honest_peer_is_banned_for_a_liars_leaves() -> None:
    health, error = SourceHealth(trusted_sources={"liar", "honest"}), BlobHashMismatch("wrong")
    health.record_failure(Corrupt("too long"), "liar")
    assert health.record_failure(error, "honest") == 0.0
    found = [BlobHolder("honest", BLOB), BlobHolder("liar", BLOB)]
    assert health.askable(found) == [BlobHolder("honest", BLOB)] and not health.trusted_sources
    health.trusted_sources.add("honest")  # alone this time
    health.record_failure(error, "honest")
    assert health.askable(found) == []


def test_I1_the_sender_of_the_bytes_is_blamed_not_the_last_asked() -> None:
    health = SourceHealth(trusted_sources={"liar"})
    health.record_failure(BlobHashMismatch("wrong"), "honest")
    assert health.banned == {"liar"}


def test_wrong_leaves_of_an_earlier_process_do_not_count_for_hub() -> None:
    health, error = SourceHealth(trusted_sources={UNKNOWN_SOURCE, HUB}), BlobHashMismatch("wrong")
    assert health.record_failure(error, None) == 0.0
    assert not health.hub_was_corrupt


def test_I7_several_senders_that_never_make_the_blob_end_it() -> None:
    health, error = SourceHealth(), BlobHashMismatch("wrong")
    with pytest.raises(Corrupt):
        for _ in range(100):
            health.trusted_sources = {"a", HUB}
            health.record_failure(error, None)


def test_I7_a_hub_that_only_makes_us_wait_is_given_up_in_the_end() -> None:
    health, waited_s = SourceHealth(), 0.0
    with pytest.raises(RateLimited):
        for _ in range(10_000):
            waited_s += health.record_failure(RateLimited("wait", retry_after_s=60.0), None)
    assert waited_s == MAX_RATE_LIMITED_S


@pytest.mark.parametrize("error", [NotFound("gone"), Denied("no"), Refused("no")])
def test_a_hub_that_refuses_is_the_end_unless_a_peer_has_it(error: ShoalError) -> None:
    with pytest.raises(type(error)):
        SourceHealth().record_failure(error, None)
    assert SourceHealth().record_failure(error, None, has_peer=True) > 0


@pytest.mark.parametrize("error", [ReservationLost("gone"), NodeDown("away"), Expired("late")])
@pytest.mark.parametrize("peer", ["a", None])
def test_no_source_is_blamed_for_what_our_own_storage_did(error: ShoalError, peer: str | None) -> None:
    health = SourceHealth()
    with pytest.raises(type(error)):
        health.record_failure(error, peer)
    assert not health.banned and not health.failure_counts and not health.hub_failures


@given(st.dictionaries(st.sampled_from([BLOB, GIT]), st.text(string.hexdigits, min_size=64, max_size=64)))
def test_sealing_adds_the_learned_hashes_and_nothing_else(known: dict[str, str]) -> None:
    after = with_known_sha256(MANIFEST, known)
    assert [(f.path, f.size_bytes, f.git_sha1) for f in after.files] == [
        (f.path, f.size_bytes, f.git_sha1) for f in MANIFEST.files
    ]
    assert [f.sha256 for f in after.files] == [known.get(f.blob, f.sha256) for f in MANIFEST.files]
    assert (after.repo, after.commit) == (MANIFEST.repo, MANIFEST.commit)


@pytest.mark.parametrize(
    "error", [RateLimited("wait", retry_after_s=3.0), ReservationLost("gone"), BlobHashMismatch("x")]
)
def test_the_fetchers_own_errors_map_to_their_wire_classes(error: ShoalError) -> None:
    assert BY_CODE[error.body().code] is type(error).__bases__[0]
    assert error.body().retryable
