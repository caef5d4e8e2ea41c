"""The paths of a store and its volumes. A blob's paths lead to the volume that has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shoal_common.store.store_paths import Layout


class StoreLayout(Layout):
    """`StorePaths` with volumes. One map has the id of the volume that each blob, by name, is on.

    The ledger shares this map. Blobs that it does not name are in the store, or are to go there.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.where: dict[str, str] = {}
        self._further: dict[str, Layout] = {}

    def blob(self, sha256: str) -> Path:
        """A blob's file."""
        return self.blob_in(self.where.get(sha256, ""), sha256)

    def blob_in(self, volume_id: str, sha256: str) -> Path:
        """A blob's file on one volume; "": in the store."""
        return Layout.blob(self.of(volume_id), sha256)

    def set_aside(self, sha256: str) -> Path:
        """A corrupt blob's file in quarantine."""
        return Layout.set_aside(self._root_of(sha256), sha256)

    def set_aside_have(self, sha256: str) -> Path:
        """The bitmap of the good leaves of a blob in quarantine."""
        return Layout.set_aside_have(self._root_of(sha256), sha256)

    def partial(self, blob: str) -> Path:
        """The real directory of a partial blob, not a link to it."""
        return Layout.partial(self._root_of(blob), blob)

    def tomb(self, repo: str, commit: str) -> Path:
        """The tombstone of a model: the manifest of a model being deleted."""
        manifest = self.manifest(repo, commit)
        return self.tombs / f"{manifest.parent.name}@{manifest.name}"

    def partial_link(self, blob: str) -> Path:
        """The path in the store at which other services find that directory."""
        return super().partial(blob)

    def _root_of(self, blob: str) -> Layout:
        return self.of(self.where.get(blob, ""))

    # Volumes

    def of(self, volume_id: str) -> Layout:
        """The paths of a volume; "": of the store. Raises FileNotFoundError if the volume is missing."""
        if not volume_id:
            return self
        try:
            return self._further[volume_id]
        except KeyError:
            raise FileNotFoundError(f"volume {volume_id} is missing") from None

    def all(self) -> Iterator[tuple[str, Layout]]:
        """The store ("") and the present volumes, by id."""
        yield "", self
        yield from list(self._further.items())

    def holding(self, path: Path) -> Layout:
        """The paths of the volume that a path is on; the store's if it is on none."""
        return next((paths for paths in self._further.values() if path.is_relative_to(paths.root)), self)

    def add(self, volume_id: str, root: Path) -> None:
        """Add a volume."""
        self._further[volume_id] = Layout(root)

    def forget(self, volume_id: str) -> None:
        """Remove a volume, and every blob on it from the map."""
        self._further.pop(volume_id, None)
        for blob in [b for b, other_id in self.where.items() if other_id == volume_id]:
            del self.where[blob]

    def place(self, blob: str, volume_id: str) -> None:
        """Record that a blob is, or is to go, on a volume; "": the store."""
        if volume_id:
            self.where[blob] = volume_id
        else:
            self.where.pop(blob, None)
