"""`partial/<blob>/ready`: which leaves of a blob that arrives can be relayed. Written by the fetcher.

| offset | bytes | what                                                                                    |
| ------ | ----- | --------------------------------------------------------------------------------------- |
| 0      | 16    | the boot that wrote it (`identity.boot_bytes`)                                          |
| 16     | 8     | size of the blob in bytes, little-endian                                                |
| 24     | n     | bitmap of leaves that are verified and written (`layout.Bitmap`), n = ceil(leaves / 8)  |

Sample: of a blob of 1,048,577 bytes whose second leaf is there, after the boot, `01 00 10 00 00 00 00 00 02`.

What is written need not be durable: after a power cut it may be gone, and so the file says nothing to another boot.
It begins under another name, and from then on bits are only set, each after its leaf is written: whoever reads it
meanwhile sees some that are true. All calls block.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from shoal_common.identity import boot_bytes
from shoal_common.layout import Bitmap, Layout, leaf_count

_HEAD = struct.Struct("<16sQ")


def ready_of(data: bytes) -> Bitmap | None:
    """What the bytes of such a file say; None when they are of another boot, or no such file."""
    if len(data) < _HEAD.size:
        return None
    boot, size_bytes = _HEAD.unpack_from(data)
    bits = data[_HEAD.size :]
    if boot != boot_bytes() or len(bits) != -(-leaf_count(size_bytes) // 8):
        return None
    return Bitmap(size_bytes, bits)


def read_ready(layout: Layout, blob: str, size_bytes: int) -> Bitmap:
    """Leaves of a blob of this size that can be relayed now: none where nothing can be believed."""
    try:
        found = ready_of(layout.partial_ready(blob).read_bytes())
    except FileNotFoundError:
        found = None
    return found if found is not None and found.size_bytes == size_bytes else Bitmap(size_bytes)


class Ready:
    """The file, open for its one writer, the fetcher. `with` closes it; what it says stays true for this boot."""

    def __init__(self, layout: Layout, blob: str, durable: Bitmap) -> None:
        """Begin it, with what is durable; what it says already, of this boot, stays.

        Raises FileNotFoundError when the partial has gone, other OSErrors as the disk does.
        """
        path = layout.partial_ready(blob)
        self.bitmap = read_ready(layout, blob, durable.size_bytes)
        for leaf in range(durable.leaves):
            if leaf in durable:
                self.bitmap.add(leaf)
        new = path.with_suffix(".new")
        new.write_bytes(_HEAD.pack(boot_bytes(), durable.size_bytes) + self.bitmap.to_bytes())
        new.replace(path)
        self._fd = os.open(path, os.O_WRONLY)

    def add(self, leaves: Iterable[int]) -> None:
        """These leaves are verified and written. Raises OSError."""
        changed = set()
        for leaf in leaves:
            self.bitmap.add(leaf)
            changed.add(leaf // 8)
        bits = self.bitmap.to_bytes()
        for at in sorted(changed):
            os.pwrite(self._fd, bits[at : at + 1], _HEAD.size + at)

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
