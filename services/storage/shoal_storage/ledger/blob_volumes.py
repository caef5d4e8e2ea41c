"""Which volume each blob is on. The paths of a store and its ledger share one `BlobVolumes`."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Final


class BlobVolumes:
    """The volume of each blob, by name, that is on a volume, arrives there or is quarantined there."""

    by_blob: Final[Mapping[str, str]]
    """Volume ids. Blobs not listed are in the store itself, or are to go there."""

    def __init__(self) -> None:
        self.by_blob = self._by_blob = dict[str, str]()

    def place(self, blob: str, volume_id: str) -> None:
        """Record that a blob is, or is to go, on a volume; "": the store."""
        if volume_id:
            self._by_blob[blob] = volume_id
        else:
            self._by_blob.pop(blob, None)

    def forget_volume(self, volume_id: str) -> None:
        """Forget every blob on a volume."""
        for blob in [b for b, other_id in self._by_blob.items() if other_id == volume_id]:
            del self._by_blob[blob]

    def forget_all_but(self, known: Container[str]) -> None:
        """Forget every blob that is not known."""
        for blob in [b for b in self._by_blob if b not in known]:
            del self._by_blob[blob]
