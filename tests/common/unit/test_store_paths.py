"""Paths of a store, and bitmaps of leaves."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_common.errors import BadName
from shoal_common.messages.manifest import Manifest
from shoal_common.names import model_id
from shoal_common.store.bitmap import LEAF_BYTES, Bitmap, leaf_count
from shoal_common.store.store_paths import StorePaths

SIZES = st.integers(0, 40 * LEAF_BYTES)


@st.composite
def sizes_and_leaves(draw: st.DrawFn) -> tuple[int, set[int]]:
    size_bytes = draw(SIZES)
    leaves = leaf_count(size_bytes)
    return size_bytes, draw(st.sets(st.integers(0, leaves - 1))) if leaves else set()


@given(sizes_and_leaves())
def test_a_bitmap_and_a_leaf_set_agree(case: tuple[int, set[int]]) -> None:
    size_bytes, there = case
    bitmap = Bitmap(size_bytes)
    for leaf in there:
        bitmap.add(leaf)
    every = range(leaf_count(size_bytes))
    assert {leaf for leaf in every if leaf in bitmap} == there
    assert bitmap.complete == (there == set(every))
    assert sum(bitmap.leaf_bytes(leaf) for leaf in every) == size_bytes
    assert bitmap.have_bytes + sum(end - start for start, end in bitmap.missing_ranges()) == size_bytes


@given(sizes_and_leaves())
def test_missing_ranges_are_exactly_the_absent_leaves_joined(case: tuple[int, set[int]]) -> None:
    size_bytes, there = case
    bitmap = Bitmap(size_bytes)
    for leaf in there:
        bitmap.add(leaf)
    runs = bitmap.missing_ranges()
    covered = {leaf for start, end in runs for leaf in range(start // LEAF_BYTES, leaf_count(end))}
    assert covered == set(range(leaf_count(size_bytes))) - there
    assert all(end <= size_bytes for _, end in runs)
    assert all(earlier[1] < later[0] for earlier, later in itertools.pairwise(runs))


@given(sizes_and_leaves())
def test_I6_a_bitmap_survives_its_file(case: tuple[int, set[int]]) -> None:
    size_bytes, there = case
    bitmap = Bitmap(size_bytes)
    for leaf in there:
        bitmap.add(leaf)
    again = Bitmap(size_bytes, bitmap.to_bytes())
    assert again.missing_ranges() == bitmap.missing_ranges()


@given(SIZES, st.binary(max_size=10))
def test_I1_a_bitmap_of_another_length_is_not_trusted(size_bytes: int, data: bytes) -> None:
    bitmap = Bitmap(size_bytes, data)
    if len(data) != len(bitmap.to_bytes()):
        assert bitmap.have_bytes == 0


HOSTILE_BLOBS = ["", "..", "a", "../" + "a" * 61, "A" * 64, "g" * 64, "git-" + "a" * 39, "a" * 64 + "\n"]


@pytest.mark.parametrize("blob", HOSTILE_BLOBS)
def test_I10_no_path_is_made_of_a_hostile_blob_commit_or_file(tmp_path: Path, blob: str) -> None:
    layout = StorePaths(tmp_path)
    manifest = Manifest(repo="org/name", commit="0" * 40, files=[])
    builds: list[Callable[[], Path]] = [
        lambda: layout.blob(blob),
        lambda: layout.partial(blob),
        lambda: layout.manifest(model_id("org/name", blob)),
        lambda: layout.view(model_id("org/name", blob)),
        lambda: layout.view_file(manifest, f"../{blob}"),
    ]
    for build in builds:
        with pytest.raises(BadName):
            build()


def test_all_paths_are_inside_the_store(tmp_path: Path) -> None:
    layout = StorePaths(tmp_path)
    manifest = Manifest(repo="org/name", commit="0" * 40, files=[])
    assert layout.blob("ab" * 32) == tmp_path / "blobs" / "sha256" / "ab" / ("ab" * 32)
    assert layout.view_file(manifest, "a/b.json") == tmp_path / "views" / "org--name" / ("0" * 40) / "a" / "b.json"
