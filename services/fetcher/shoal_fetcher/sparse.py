"""Which leaves of a model's files the stages with some layers need (docs/sparse.md). Pure.

What is learned comes step by step: first the small files and the first leaf of each file with weights, then the rest
of a header that is longer than that, then, by the headers and config.json, the leaves in which needed tensors are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shoal_common import leafset
from shoal_common.errors import Corrupt
from shoal_common.messages.records import Manifest, ManifestFile
from shoal_common.tensors import StageTensors, tensor_ranges

CONFIG = "config.json"
SMALL_BYTES = 64 << 20
"""Files without tensors up to this size are needed whole, tokenizers among them; larger ones no stage opens."""
_WEIGHTS = re.compile(r"model[^/]*\.safetensors")


def weight_files(manifest: Manifest) -> list[ManifestFile]:
    """The files that stages read tensors from."""
    return [f for f in manifest.files if _WEIGHTS.fullmatch(f.path) and f.size_bytes]


def first_leaves(manifest: Manifest) -> dict[str, int]:
    """What is needed before any header is known: of weights the first leaf, of large files without any nothing.

    As everywhere here: blobs that are not named are needed whole.
    """
    weights = {f.blob for f in weight_files(manifest)}
    large = {f.blob for f in manifest.files if f.size_bytes > SMALL_BYTES}
    return {blob: 1 if blob in weights else 0 for blob in weights | large}


def header_leaves(end: int, file: ManifestFile) -> int:
    """The leaves of a header that ends there. Raises Corrupt when the file is shorter."""
    if end > file.size_bytes:
        raise Corrupt(f"the safetensors header of {file.path} would end at {end} of its {file.size_bytes} bytes")
    return leafset.covering(0, end)


def stage_leaves(
    config: Mapping[str, Any],
    headers: Mapping[str, bytes],
    files: Iterable[ManifestFile],
    layers: Iterable[Sequence[int]],
) -> dict[str, int]:
    """By blob, the leaves of weight files that the stages need: their headers, and each leaf with a needed byte.

    `headers` has each blob's bytes up to the header's end. Nothing less would do: a leaf is the least that can be
    verified, so gaps between needed tensors are read only where they share a leaf with one. Raises Corrupt,
    Unsupported.
    """
    stages = [StageTensors(config, first, last) for first, last in layers]
    found: dict[str, int] = {}
    for file in files:
        header = headers[file.blob]
        leaves = found.get(file.blob, 0) | header_leaves(len(header), file)
        for name, (start, end) in tensor_ranges(header, file.path).items():
            if end > file.size_bytes:
                raise Corrupt(f"tensor {name} of {file.path} would end at {end} of its {file.size_bytes} bytes")
            if any(stage.needs(name) for stage in stages):
                leaves |= leafset.covering(start, end)
        found[file.blob] = leaves
    return found
