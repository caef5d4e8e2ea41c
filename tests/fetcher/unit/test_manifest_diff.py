"""A node's manifest is the hub's, or the first difference is named."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from shoal_common.errors import Denied, HubUnavailable, NotFound, ShoalError
from shoal_common.messages.manifest import Manifest, ManifestFile, content_commit
from shoal_common.names import ModelRef
from shoal_fetcher.hub import listings
from shoal_fetcher.hub.listings import HubListings
from shoal_fetcher.sources.manifest_diff import by_git_name, difference, names_itself, with_listed_names

HASHES = st.sampled_from(["a" * 64, "b" * 64])
SHA1S = st.sampled_from(["c" * 40, "d" * 40])
PATHS = st.sampled_from(["config.json", "model.safetensors", "x/y.py"])
LARGE = st.builds(ManifestFile, path=PATHS, size_bytes=st.integers(0, 3), sha256=HASHES)
SMALL = st.builds(ManifestFile, path=PATHS, size_bytes=st.integers(0, 3), git_sha1=SHA1S)
LISTED = st.lists(LARGE | SMALL, max_size=3, unique_by=lambda f: f.path)


def manifest(files: list[ManifestFile]) -> Manifest:
    return Manifest(repo="org/name", commit="e" * 40, files=files)


def as_a_node_has_it(listed: list[ManifestFile]) -> list[ManifestFile]:
    """Return files as a node that has them publishes them: each with its sha256."""
    return [structs.replace(f, sha256=f.sha256 or "f" * 64, leaf_list_digest="9" * 64) for f in listed]


@given(LISTED, LISTED)
def test_a_manifest_differs_unless_its_files_are_the_hubs(
    listed: list[ManifestFile], other: list[ManifestFile]
) -> None:
    theirs = manifest(as_a_node_has_it(listed))
    assert difference(theirs, manifest(listed)) == ""
    same = {(f.path, f.size_bytes, f.sha256, f.git_sha1) for f in listed} == {
        (f.path, f.size_bytes, f.sha256, f.git_sha1) for f in other
    }
    names = {f.path: f for f in other}
    reason = difference(theirs, manifest(other))
    is_silent_about_git = any(f.sha256 and names.get(f.path, f).git_sha1 for f in listed)
    if same:
        assert reason == ""
    elif not is_silent_about_git:
        assert reason and any(path in reason for path in (*names, *(f.path for f in listed)))


@given(LISTED)
def test_small_files_are_named_as_the_hub_names_them(listed: list[ManifestFile]) -> None:
    theirs = structs.replace(manifest(as_a_node_has_it(listed)), unchecked_from="b")
    checked = with_listed_names(theirs, manifest(listed))
    assert checked.unchecked_from == "" and checked.sealed
    by_hub, hints = by_git_name(checked)
    assert [f.blob for f in by_hub.files] == [f.blob for f in listed]
    assert set(hints) == {f.blob for f in listed if f.git_sha1} and set(hints.values()) <= {"f" * 64}


def test_a_local_directorys_commit_is_made_of_its_files() -> None:
    local = manifest([ManifestFile(path="a", size_bytes=1, sha256="a" * 64)])
    assert not names_itself(local)
    assert names_itself(structs.replace(local, commit=content_commit(local.files)))


class Hub:
    """A hub that fails so, or lists nothing."""

    def __init__(self, error: ShoalError | None) -> None:
        self._error, self.asked = error, 0

    async def resolve(self, ref: ModelRef) -> Manifest:
        self.asked += 1
        if self._error is not None:
            raise self._error
        await asyncio.Event().wait()
        raise AssertionError


@pytest.mark.parametrize("error", [HubUnavailable("down"), None], ids=["down", "silent"])
async def test_a_hub_without_an_answer_is_left_alone_for_that_model(
    monkeypatch: pytest.MonkeyPatch, error: ShoalError | None
) -> None:
    monkeypatch.setattr(listings, "DEADLINE_S", 0.01)
    hub = Hub(error)
    asking = HubListings(cast(Any, hub))
    for _ in range(2):
        with pytest.raises(HubUnavailable):
            await asking.listing(ModelRef("org/name", "main"))
    assert hub.asked == 1
    with pytest.raises(HubUnavailable):
        await asking.listing(ModelRef("org/other", "main"))
    assert hub.asked == 2


@pytest.mark.parametrize("error", [NotFound("none"), Denied("private")])
async def test_what_the_hub_does_not_show_is_asked_again(error: ShoalError) -> None:
    hub = Hub(error)
    asking = HubListings(cast(Any, hub))
    for count in (1, 2):
        with pytest.raises(type(error)):
            await asking.listing(ModelRef("org/name", "main"))
        assert hub.asked == count
