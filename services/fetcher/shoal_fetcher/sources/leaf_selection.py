"""Selects the leaves of a model's files that stages with some layers need (docs/sparse.md). Pure.

It works in steps: first the small files and the first leaf of each weight file, then the rest of a header longer than
that, then, by the headers and config.json, the leaves that contain needed tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shoal_common.errors import Corrupt
from shoal_common.messages.manifest import Manifest, ManifestFile
from shoal_common.models.layer_tensors import StageTensors
from shoal_common.models.safetensors_header import parse_tensor_ranges
from shoal_common.store import leaf_set

CONFIG = "config.json"
MAX_SMALL_FILE_BYTES = 64 << 20
"""Files without tensors up to this size are needed whole, tokenizers among them; no stage opens larger ones."""
_WEIGHTS = re.compile(r"model[^/]*\.safetensors")


def weight_files(manifest: Manifest) -> list[ManifestFile]:
    """Return the files that stages read tensors from."""
    return [f for f in manifest.files if _WEIGHTS.fullmatch(f.path) and f.size_bytes]


def first_leaves(manifest: Manifest) -> dict[str, int]:
    """Return the leaves needed before any header is known: of weight files the first, of other large files none.

    As everywhere here, blobs that are missing from the result are needed whole.
    """
    weights = {f.blob for f in weight_files(manifest)}
    large = {f.blob for f in manifest.files if f.size_bytes > MAX_SMALL_FILE_BYTES}
    return {blob: 1 if blob in weights else 0 for blob in weights | large}


def header_leaves(end: int, file: ManifestFile) -> int:
    """Return the leaves of a header that ends at this offset. Raises Corrupt if the file is shorter."""
    if end > file.size_bytes:
        raise Corrupt(f"the safetensors header of {file.path} would end at byte {end} of {file.size_bytes}")
    return leaf_set.leaves_of_bytes(0, end)


def stage_leaves(
    config: Mapping[str, Any],
    headers: Mapping[str, bytes],
    files: Iterable[ManifestFile],
    layers: Iterable[Sequence[int]],
) -> dict[str, int]:
    """Return by blob the leaves of weight files that the stages need: the headers, and each leaf with a needed byte.

    `headers` has each blob's bytes up to the end of its header. A leaf is the smallest verifiable unit, so gaps
    between needed tensors are read only where they share a leaf with one. Raises Corrupt, Unsupported.
    """
    stages = [StageTensors(config, first, last) for first, last in layers]
    leaves_by_blob: dict[str, int] = {}
    for file in files:
        header = headers[file.blob]
        leaves = leaves_by_blob.get(file.blob, 0) | header_leaves(len(header), file)
        for name, (start, end) in parse_tensor_ranges(header, file.path).items():
            if end > file.size_bytes:
                raise Corrupt(f"tensor {name} of {file.path} would end at byte {end} of {file.size_bytes}")
            if any(stage.needs(name) for stage in stages):
                leaves |= leaf_set.leaves_of_bytes(start, end)
        leaves_by_blob[file.blob] = leaves
    return leaves_by_blob
