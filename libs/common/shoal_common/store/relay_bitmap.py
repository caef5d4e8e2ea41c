"""The relay bitmap `partial/<blob>/ready`: which leaves of a partial blob can be relayed. Written by the fetcher.

| offset | bytes | what                                                                                    |
| ------ | ----- | --------------------------------------------------------------------------------------- |
| 0      | 16    | the boot that wrote it (`process_identity.boot_bytes`)                                  |
| 16     | 8     | size of the blob in bytes, little-endian                                                |
| 24     | n     | bitmap of verified and written leaves (`bitmap.Bitmap`), n = ceil(leaves / 8)           |

Sample: for a blob of 1,048,577 bytes with its second leaf, after the boot, `01 00 10 00 00 00 00 00 02`.

Written leaves need not be durable: a power cut may lose them, so the file is void in another boot. It is created
under another name, and then bits are only set, each after its leaf is written: a concurrent reader sees a subset of
what is true. All calls block.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from shoal_common.host.process_identity import boot_id
from shoal_common.store.bitmap import Bitmap, leaf_count
from shoal_common.store.store_paths import StorePaths

_HEAD = struct.Struct("<16sQ")


def parse_relay_bitmap(data: bytes) -> Bitmap | None:
    """Parse such a file; None if it is of another boot, or not such a file."""
    if len(data) < _HEAD.size:
        return None
    boot, size_bytes = _HEAD.unpack_from(data)
    bits = data[_HEAD.size :]
    if boot != boot_id() or len(bits) != -(-leaf_count(size_bytes) // 8):
        return None
    return Bitmap(size_bytes, bits)


def read_relay_bitmap(layout: StorePaths, blob: str, size_bytes: int) -> Bitmap:
    """Return the leaves of a blob of this size that can be relayed now; none if the file cannot be trusted."""
    try:
        bitmap = parse_relay_bitmap(layout.relay_bitmap(blob).read_bytes())
    except FileNotFoundError:
        bitmap = None
    return bitmap if bitmap is not None and bitmap.size_bytes == size_bytes else Bitmap(size_bytes)


class RelayBitmapFile:
    """The relay bitmap, opened by its only writer, the fetcher. It stays valid for this boot after it is closed."""

    def __init__(self, layout: StorePaths, blob: str, durable: Bitmap) -> None:
        """Create it with the durable leaves, and keep the leaves that it lists for this boot.

        Raises FileNotFoundError if the partial blob is gone, or another OSError of the disk.
        """
        path = layout.relay_bitmap(blob)
        self.bitmap = read_relay_bitmap(layout, blob, durable.size_bytes)
        for leaf in range(durable.leaf_count):
            if leaf in durable:
                self.bitmap.add(leaf)
        new = path.with_suffix(".new")
        new.write_bytes(_HEAD.pack(boot_id(), durable.size_bytes) + self.bitmap.to_bytes())
        new.replace(path)
        self._fd = os.open(path, os.O_WRONLY)

    def add(self, leaves: Iterable[int]) -> None:
        """Record leaves as verified and written. Raises OSError."""
        changed = set()
        for leaf in leaves:
            self.bitmap.add(leaf)
            changed.add(leaf // 8)
        bits = self.bitmap.to_bytes()
        for index in sorted(changed):
            os.pwrite(self._fd, bits[index : index + 1], _HEAD.size + index)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
