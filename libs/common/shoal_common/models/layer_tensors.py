"""Which tensors of a model a stage with some layers needs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shoal_common.errors import BadInput, Unsupported

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def check_layers(layers: Sequence[int]) -> tuple[int, int]:
    """Return foreign layers as `[first, last)`. Raises BadInput."""
    if len(layers) != 2 or not 0 <= layers[0] < layers[1]:
        raise BadInput(f"{list(layers)[:4]} is not a range of layers: give [first, last), for example [0, 14]")
    return layers[0], layers[1]


def covers(held: Iterable[Sequence[int]], layers: Sequence[int]) -> bool:
    """Return whether one of these ranges of layers contains all of `layers`."""
    return any(first <= layers[0] and layers[1] <= last for first, last in held)


def union(runs: Iterable[Sequence[int]]) -> list[list[int]]:
    """Return ranges of layers in order, adjacent ones joined."""
    joined: list[list[int]] = []
    for first, last in sorted((first, last) for first, last in runs):
        if joined and first <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], last)
        else:
            joined.append([first, last])
    return joined


class StageTensors:
    """Which tensors of a model the stage with the layers [first, last) needs.

    The first stage needs the embedding, the last one norm and head, and the embedding too if the head is, or may be,
    tied to it: a config that does not say leaves it to the architecture's default. Tensors that are neither of a
    layer, nor embedding, norm or head, go to every stage.
    """

    def __init__(self, config: Mapping[str, Any], first: int, last: int) -> None:
        inner = config.get("text_config")
        text = {**config, **inner} if isinstance(inner, Mapping) else config
        count = text.get("num_hidden_layers")
        if type(count) is not int or not 0 <= first < last <= count:
            raise Unsupported(
                f"layers {first} to {last} of a model that has {count!r}: the layout is for another model"
            )
        self._first, self._last, self._count = first, last, count
        self._is_last = last == count
        self._embeds = first == 0 or (self._is_last and text.get("tie_word_embeddings") is not False)

    def needs(self, name: str) -> bool:
        """Return whether a tensor is needed, by its name."""
        match = LAYER.search(name)
        if match:
            # Layers past the count belong to modules that no stage computes, such as multi-token prediction.
            return self._first <= int(match.group(1)) < self._last
        if "embed_tokens" in name:
            return self._embeds
        if "lm_head" in name or name.endswith("norm.weight"):
            return self._is_last
        return True
