"""The paths of a store and its volumes. A blob's paths lead to the volume that has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shoal_common.names import ModelId
from shoal_common.store.store_paths import StorePaths, model_file_name
from shoal_storage.ledger.blob_volumes import BlobVolumes


class VolumePaths(StorePaths):
    """`StorePaths` with volumes. `blob_volumes`, which the ledger shares, has the volume that each blob is on."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.blob_volumes = BlobVolumes()
        self._volumes: dict[str, StorePaths] = {}

    def blob(self, sha256: str) -> Path:
        """A blob's file."""
        return self.blob_on(self.volume_of(sha256), sha256)

    def blob_on(self, volume_id: str, sha256: str) -> Path:
        """A blob's file on one volume; "": in the store."""
        return StorePaths.blob(self.volume(volume_id), sha256)

    def quarantined(self, sha256: str) -> Path:
        """A corrupt blob's file in quarantine."""
        return StorePaths.quarantined(self._paths_of(sha256), sha256)

    def quarantined_have(self, sha256: str) -> Path:
        """The bitmap of the good leaves of a blob in quarantine."""
        return StorePaths.quarantined_have(self._paths_of(sha256), sha256)

    def partial(self, blob: str) -> Path:
        """The real directory of a partial blob, not a link to it."""
        return StorePaths.partial(self._paths_of(blob), blob)

    def tombstone(self, model: ModelId) -> Path:
        """The tombstone of a model: the manifest of a model being deleted."""
        return self.tombstones / f"{model_file_name(model)}.json"

    def partial_link(self, blob: str) -> Path:
        """The path in the store at which other services find that directory."""
        return super().partial(blob)

    def _paths_of(self, blob: str) -> StorePaths:
        return self.volume(self.volume_of(blob))

    # Volumes

    def volume_of(self, blob: str) -> str:
        """The id of the volume that a blob is on, or is to go to; "": the store."""
        return self.blob_volumes.by_blob.get(blob, "")

    def volume(self, volume_id: str) -> StorePaths:
        """The paths of a volume; "": of the store. Raises FileNotFoundError if the volume is missing."""
        if not volume_id:
            return self
        try:
            return self._volumes[volume_id]
        except KeyError:
            raise FileNotFoundError(f"volume {volume_id} is missing") from None

    def each_volume(self) -> Iterator[tuple[str, StorePaths]]:
        """The store ("") and the present volumes, by id."""
        yield "", self
        yield from list(self._volumes.items())

    def volume_of_path(self, path: Path) -> StorePaths:
        """The paths of the volume that a path is on; the store's if it is on none."""
        return next((paths for paths in self._volumes.values() if path.is_relative_to(paths.root)), self)

    def add_volume(self, volume_id: str, root: Path) -> None:
        """Add a volume."""
        self._volumes[volume_id] = StorePaths(root)

    def remove_volume(self, volume_id: str) -> None:
        """Remove a volume, and every blob on it from the map."""
        self._volumes.pop(volume_id, None)
        self.blob_volumes.forget_volume(volume_id)
