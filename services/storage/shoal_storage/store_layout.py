"""The paths of a store and of its further roots: those of a blob lead to the root that has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shoal_common.layout import Layout


class StoreLayout(Layout):
    """A `Layout` for storage itself. `where` says which blobs, by name, are in which further root, by its id.

    It is the ledger's `where` too. What it does not name is in the store, or is to come there.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.where: dict[str, str] = {}
        self._further: dict[str, Layout] = {}

    def blob(self, sha256: str) -> Path:
        """A blob's file."""
        return self.blob_in(self.where.get(sha256, ""), sha256)

    def blob_in(self, further: str, sha256: str) -> Path:
        """A blob's file in a certain root; "": in the store."""
        return Layout.blob(self.of(further), sha256)

    def set_aside(self, sha256: str) -> Path:
        """Where a blob goes that is not what it is called."""
        return Layout.set_aside(self._root_of(sha256), sha256)

    def set_aside_have(self, sha256: str) -> Path:
        """The bitmap of the good leaves of a blob that was set aside."""
        return Layout.set_aside_have(self._root_of(sha256), sha256)

    def partial(self, blob: str) -> Path:
        """The directory of a blob that is arriving, links aside."""
        return Layout.partial(self._root_of(blob), blob)

    def tomb(self, repo: str, commit: str) -> Path:
        """Where the manifest of a model stays whose deletion has begun."""
        manifest = self.manifest(repo, commit)
        return self.tombs / f"{manifest.parent.name}@{manifest.name}"

    def partial_link(self, blob: str) -> Path:
        """Where everybody else finds that directory."""
        return super().partial(blob)

    def _root_of(self, blob: str) -> Layout:
        return self.of(self.where.get(blob, ""))

    # Roots

    def of(self, further: str) -> Layout:
        """The paths of a further root; "": of the store. Raises FileNotFoundError for a root that is away."""
        if not further:
            return self
        try:
            return self._further[further]
        except KeyError:
            raise FileNotFoundError(f"the further root {further} is away") from None

    def all(self) -> Iterator[tuple[str, Layout]]:
        """The store ("") and the further roots that are there, by their ids."""
        yield "", self
        yield from list(self._further.items())

    def holding(self, path: Path) -> Layout:
        """The root that a path is in; the store, if it is in no other."""
        return next((lay for lay in self._further.values() if path.is_relative_to(lay.root)), self)

    def add(self, further: str, root: Path) -> None:
        """A further root is there from now on."""
        self._further[further] = Layout(root)

    def forget(self, further: str) -> None:
        """A further root is there no more, nor anything in it."""
        self._further.pop(further, None)
        for blob in [b for b, its in self.where.items() if its == further]:
            del self.where[blob]

    def place(self, blob: str, further: str) -> None:
        """A blob is, or is to come, in this root; "": the store."""
        if further:
            self.where[blob] = further
        else:
            self.where.pop(blob, None)
