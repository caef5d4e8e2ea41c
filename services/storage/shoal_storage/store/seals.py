"""The seals beside the leaf lists of this store: who hashed each blob whole, by whose signature.

    leaves/<ab>/<sha256>.seal   a LeafListSeal (JSON): of this node once it has hashed the blob by sha256 itself;
                                until then of the node whose leaf list the blob was verified by
    distrusted/<node>           empty; exists while the seals of a node do not count here, since it sealed a corrupt
                                blob. Deleting the file, also while Shoal runs, makes them count again

A blob without this node's seal was not hashed by sha256 here as far as anybody knows: `handlers/seal_check.py` does
that. So a lost seal costs one hashing, and a store from before there were seals is hashed once. A blob of one leaf
never arrives by a list, and has no seal; nor has any blob of a node that belongs to no cluster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from shoal_common.errors import BadMessage, BadName
from shoal_common.host.private_files import FILE_MODE
from shoal_common.identity.node_identity import NodeIdentity
from shoal_common.identity.seals import MAX_SEAL_BYTES, SealedList, SealKeeper
from shoal_common.messages import decode, encode
from shoal_common.messages.manifest import LeafListSeal
from shoal_common.names import check_node
from shoal_common.store.bitmap import leaf_count
from shoal_common.store.leaf_hash import hash_leaf_list
from shoal_storage.files import leaf_hash_file
from shoal_storage.files.atomic_file import fsync_path, make_directory, replace_file
from shoal_storage.files.hashing import FileHashes
from shoal_storage.store.store import Store

MIN_SEALED_LEAVES = 2
"""A smaller blob is hashed whole on arrival."""


class BlobSeals:
    """Reads and writes a store's seals. Blocking."""

    def __init__(
        self,
        store: Store,
        identity: NodeIdentity | None,
        certificate_of: Callable[[str], str | None],
        trust_sealers: Callable[[], str],
    ) -> None:
        self._layout, self._own_node = store.layout, identity.node if identity else ""
        self._keeper = SealKeeper(identity, certificate_of, trust_sealers, self.distrusted)
        self.signs = self._keeper.signs
        """Whether this node makes seals: it belongs to a cluster."""

    def refusal(self, seal: LeafListSeal | None, sealed: SealedList) -> str:
        """Return why a list with this seal is no substitute for hashing the blob; "" if it is one."""
        return self._keeper.refusal(seal, sealed)

    def record(self, hashes: FileHashes, seal: LeafListSeal | None) -> None:
        """Write the seal of a blob that was committed: `seal` if it was verified by that list, else this node's."""
        if hashes.by_leaf_list:
            self._write(hashes.sha256, seal)
        else:
            self.record_hashed(hashes.sha256, hashes.size_bytes, hashes.leaf_hashes)

    def record_hashed(self, sha256: str, size_bytes: int, leaf_hashes: bytes) -> None:
        """Write this node's seal of a blob that it has hashed by sha256."""
        if leaf_count(size_bytes) >= MIN_SEALED_LEAVES:
            sealed = SealedList(sha256, size_bytes, hash_leaf_list(leaf_hashes))
            self._write(sha256, self._keeper.sign(sealed, time.time()))

    def not_hashed_here(self, blobs: Mapping[str, int]) -> list[str]:
        """Return those of the blobs, given with their sizes, that this node's own seal does not say it has hashed."""
        return [b for b, size_bytes in sorted(blobs.items()) if not self._was_hashed_here(b, size_bytes)]

    def _was_hashed_here(self, sha256: str, size_bytes: int) -> bool:
        if leaf_count(size_bytes) < MIN_SEALED_LEAVES:
            return True
        digest = leaf_hash_file.read_leaf_list_digest(self._layout, sha256, size_bytes)
        return bool(digest) and self._keeper.is_own(self.read(sha256), SealedList(sha256, size_bytes, digest))

    def sealer_of(self, sha256: str, size_bytes: int, leaf_hashes: bytes) -> str:
        """Return the other node that sealed just these leaves as this blob; "" if none did."""
        seal = self.read(sha256)
        if seal is None or seal.node == self._own_node:
            return ""
        # With other leaves than the sealed ones the disk is to blame.
        return seal.node if leaf_hash_file.read(self._layout, sha256, size_bytes) == leaf_hashes else ""

    def read(self, sha256: str) -> LeafListSeal | None:
        """Return the seal beside a blob's leaf list; None if there is none."""
        try:
            with self._layout.seal(sha256).open("rb") as f:
                return decode(f.read(MAX_SEAL_BYTES), LeafListSeal)
        except (OSError, BadMessage):
            return None

    def _write(self, sha256: str, seal: LeafListSeal | None) -> None:
        path = self._layout.seal(sha256)
        if seal is None:
            path.unlink(missing_ok=True)
        else:
            make_directory(path.parent)
            replace_file(path, encode(seal))

    def distrusted(self) -> frozenset[str]:
        """The nodes that have sealed a corrupt blob here."""
        names = set()
        with suppress(FileNotFoundError):
            for path in self._layout.distrusted.iterdir():
                with suppress(BadName):
                    names.add(check_node(path.name))
        return frozenset(names)

    def distrust(self, node: str) -> None:
        """Let a node's seals count here no more, durably."""
        path = self._layout.distrusted_sealer(node)
        path.touch(FILE_MODE)
        fsync_path(path.parent)
