"""A stage reads from files of which only some leaves are there: it never touches what is not (I1)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from shoal_common.errors import BadInput, Corrupt, Unsupported
from shoal_common.models.layer_tensors import StageTensors
from shoal_common.models.model_shape import read_ranges
from shoal_common.store import leaf_set
from shoal_inference.stage.errors import LoadFailed


def check_leaves_present(
    model_dir: Path,
    first_layer: int,
    last_layer: int,
    leaves: Mapping[str, Sequence[Sequence[int]]],
    weight_bytes: int,
) -> None:
    """Raise LoadFailed unless all tensors of a stage are in leaves that are there.

    `weight_bytes` is what the stage is about to read: more than the tensors that it should need would be others.
    """
    own_bytes = 0
    try:
        stage = StageTensors(json.loads((model_dir / "config.json").read_bytes()), first_layer, last_layer)
        for path in sorted(model_dir.glob("model*.safetensors")):
            size_bytes = path.stat().st_size
            there = leaf_set.all_leaves(size_bytes)
            if path.name in leaves:
                there = leaf_set.from_ranges(leaves[path.name], size_bytes)
            if not there & 1:
                raise LoadFailed(f"the header of {path.name} is missing: download these layers again")
            for name, (start, end) in read_ranges(path).items():
                if not stage.needs(name):
                    continue
                own_bytes += end - start
                if leaf_set.leaves_of_bytes(start, end) & ~there:
                    raise LoadFailed(
                        f"tensor {name} of {path.name} is missing or incomplete: download these layers again"
                    )
    except (BadInput, Corrupt, Unsupported) as error:
        raise LoadFailed(error.message) from error
    if weight_bytes > own_bytes:
        raise LoadFailed(
            f"layers {first_layer} to {last_layer} would read {weight_bytes} bytes where their tensors have "
            f"{own_bytes}: this model must be complete on this node, run `shoal pull`"
        )
