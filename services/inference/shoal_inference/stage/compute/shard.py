"""The layers this stage keeps, and running them. Everything here runs on the MLX thread.

mlx-lm builds the whole model lazily, which reads nothing; then every module that is not this stage's is dropped,
and only what is left is evaluated. So the weights of other stages are never read from the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from shoal_inference.stage.compute import mlx_lm_adapter
from shoal_inference.stage.compute.slice_bounds_check import check_leaves_present
from shoal_inference.stage.errors import FatalError, LoadFailed, UnreadableModel

Layer = Callable[[mx.array, Any, mlx_lm_adapter.Cache], mx.array]


class LoadedShard:
    """`layers[first:last]` of a model, with the embedding on rank 0 and norm and head on the last rank."""

    def __init__(self, model: mlx_lm_adapter.Model, first_layer: int, last_layer: int) -> None:
        backbone = model.model
        count = len(backbone.layers)
        if not 0 <= first_layer < last_layer <= count:
            raise LoadFailed(
                f"layers {first_layer} to {last_layer} of a model with {count}: the layout is for another model"
            )
        self.is_first = first_layer == 0
        self.is_last = last_layer == count
        tied = not hasattr(model, "lm_head")
        backbone.layers = backbone.layers[first_layer:last_layer]
        if not (self.is_first or (self.is_last and tied)):
            del backbone.embed_tokens
        if not self.is_last:
            del backbone.norm
            if not tied:
                del model.lm_head
        self._model = model
        self._backbone = backbone
        self._layers: Sequence[Layer] = backbone.layers
        # Only llama.py has windows, and it takes one window for all its sliding layers.
        self._windows: tuple[int | None, ...] = tuple(
            backbone.sliding_window if getattr(layer, "use_sliding", False) else None for layer in backbone.layers
        )
        self._head: Callable[[mx.array], mx.array] | None = None
        if self.is_last:
            self._head = backbone.embed_tokens.as_linear if tied else model.lm_head

    @property
    def weight_bytes(self) -> int:
        """What the own tensors take, evaluated or not."""
        return sum(array.nbytes for array in mlx_lm_adapter.parameters(self._model))

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding; 0 where there is none."""
        return int(self._backbone.embed_tokens.weight.shape[0]) if self.is_first else 0

    def read(self) -> None:
        """Read the own tensors from the disk into memory."""
        mx.eval(self._model.parameters())

    def make_caches(self) -> list[mlx_lm_adapter.Cache]:
        """Fresh caches, one a layer; they take no memory until used."""
        return mlx_lm_adapter.make_caches(self._model)

    def embed(self, tokens: Sequence[int]) -> mx.array:
        """Token ids to (1, tokens, width)."""
        h: mx.array = self._backbone.embed_tokens(mx.array([list(tokens)]))
        return h

    def forward(self, h: mx.array, caches: Sequence[mlx_lm_adapter.Cache]) -> mx.array:
        """(1, tokens, width) through the own layers; lazy, the caches' new state included."""
        # Masks before any layer runs: they are made from the cache's offset, and all own caches share it here.
        masks: dict[int | None, Any] = {}
        for layer_cache, window in zip(caches, self._windows, strict=True):
            if window not in masks:
                masks[window] = mlx_lm_adapter.attention_mask(h, layer_cache, window)
        for layer, layer_cache, window in zip(self._layers, caches, self._windows, strict=True):
            h = layer(h, masks[window], layer_cache)
        return h

    def log_probabilities(self, h: mx.array) -> mx.array:
        """(1, tokens, width) after the last layer to (1, vocabulary) of the last position, float32.

        A model's own type is too narrow: float16 has 11 bits, and turns a division by a small temperature into
        infinities.
        """
        if self._head is None:
            raise RuntimeError("only the last stage has a head")
        logits = self._head(self._backbone.norm(h))[:, -1, :].astype(mx.float32)
        return logits - mx.logsumexp(logits, keepdims=True)


def load_shard(
    model_dir: Path, first_layer: int, last_layer: int, leaves: Mapping[str, Sequence[Sequence[int]]] | None = None
) -> LoadedShard:
    """Cut and read the shard; what does not load raises UnreadableModel with mlx-lm's words.

    `leaves`: of files of which not all is there, the leaves that are. LoadFailed when the shard reads others.
    """
    try:
        shard = LoadedShard(mlx_lm_adapter.load_lazy(model_dir), first_layer, last_layer)
        if leaves:
            check_leaves_present(model_dir, first_layer, last_layer, leaves, shard.weight_bytes)
        shard.read()
    except FatalError:
        raise
    except Exception as error:  # whatever a file makes mlx-lm raise
        raise UnreadableModel.because(f"the weights in {model_dir}", error) from error
    return shard
