"""The relay bitmap: the fileserver reads what the fetcher writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_common.host.process_identity import boot_id
from shoal_common.store import relay_bitmap
from shoal_common.store.bitmap import LEAF_BYTES, Bitmap
from shoal_common.store.relay_bitmap import RelayBitmapFile, parse_relay_bitmap, read_relay_bitmap
from shoal_common.store.store_paths import StorePaths

BLOB = "ab" * 32


def partial_in(root: Path) -> StorePaths:
    """A store with a partial blob."""
    layout = StorePaths(root)
    layout.partial(BLOB).mkdir(parents=True)
    return layout


def leaves_of(bitmap: Bitmap) -> list[int]:
    """Return the leaves in a bitmap."""
    return [leaf for leaf in range(bitmap.leaf_count) if leaf in bitmap]


def test_it_begins_with_what_is_durable_and_gains_what_is_added(tmp_path: Path) -> None:
    layout, size = partial_in(tmp_path), 20 * LEAF_BYTES - 7
    durable = Bitmap(size)
    durable.add(3)
    with RelayBitmapFile(layout, BLOB, durable) as relay:
        assert leaves_of(read_relay_bitmap(layout, BLOB, size)) == [3]
        relay.add([19, 0, 8])
        assert leaves_of(read_relay_bitmap(layout, BLOB, size)) == leaves_of(relay.bitmap) == [0, 3, 8, 19]
    # A fetcher that restarts in the same boot trusts its own file.
    with RelayBitmapFile(layout, BLOB, Bitmap(size)) as again:
        assert leaves_of(again.bitmap) == [0, 3, 8, 19]


def test_a_bitmap_of_another_boot_is_empty_and_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, size = partial_in(tmp_path), 9 * LEAF_BYTES
    with RelayBitmapFile(layout, BLOB, Bitmap(size)) as relay:
        relay.add(range(9))
    monkeypatch.setattr(relay_bitmap, "boot_id", lambda: bytes(16))
    assert leaves_of(read_relay_bitmap(layout, BLOB, size)) == []
    with RelayBitmapFile(layout, BLOB, Bitmap(size)):
        assert parse_relay_bitmap(layout.relay_bitmap(BLOB).read_bytes()) is not None
        assert leaves_of(read_relay_bitmap(layout, BLOB, size)) == []


def test_a_bitmap_of_another_size_or_without_a_file_is_empty(tmp_path: Path) -> None:
    layout, size = partial_in(tmp_path), 2 * LEAF_BYTES
    assert leaves_of(read_relay_bitmap(layout, BLOB, size)) == []
    with RelayBitmapFile(layout, BLOB, Bitmap(size)) as relay:
        relay.add([1])
    assert leaves_of(read_relay_bitmap(layout, BLOB, size + 1)) == []


@given(st.binary(max_size=40) | st.binary(max_size=20).map(lambda rest: boot_id() + rest))
def test_any_bytes_of_a_bitmap_are_trusted_as_a_unit_or_not(data: bytes) -> None:
    found = parse_relay_bitmap(data)
    if found is not None:
        assert data[:16] == boot_id() and found.size_bytes == int.from_bytes(data[16:24], "little")
        assert found.to_bytes() == data[24:]


def test_the_sample_in_the_docstring_is_what_is_written(tmp_path: Path) -> None:
    layout = partial_in(tmp_path)
    with RelayBitmapFile(layout, BLOB, Bitmap(LEAF_BYTES + 1)) as relay:
        relay.add([1])
    data = layout.relay_bitmap(BLOB).read_bytes()
    assert data[:16] == boot_id() and data[16:].hex(" ") == "01 00 10 00 00 00 00 00 02"
    assert data[16:].hex(" ") in (relay_bitmap.__doc__ or "")
