"""`python -m tests.inference.weighing DIRECTORY TOKENS CHUNK`: print the memory that MLX reports for an answer.

A process of its own, so that MLX's counts are of this model alone. It is loaded and fed as a stage does it; an
architecture that cannot be cut into stages yet runs whole, in the same steps. Prints one JSON line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

from shoal_inference.stage.compute import mlx_lm_adapter
from shoal_inference.stage.compute.architectures import SUPPORTED
from shoal_inference.stage.compute.prefill import steps
from shoal_inference.stage.compute.shard import LoadedShard, load_shard


def weigh(directory: Path, tokens: int, chunk: int) -> dict[str, int]:
    """Return active bytes after loading and after the first token, and the peak between, above an idle MLX."""
    idle_bytes = mx.get_active_memory()
    config = mlx_lm_adapter.load_config(directory)
    model: Any = None
    if mlx_lm_adapter.remapping().get(config["model_type"], config["model_type"]) in SUPPORTED:
        shard: LoadedShard | None = load_shard(directory, 0, config["num_hidden_layers"])
        assert shard is not None
        caches = shard.make_caches()
    else:
        shard, model = None, mlx_lm_adapter.load_lazy(directory)
        mx.eval(model.parameters())
        caches = mlx_lm_adapter.make_caches(model)
    mx.clear_cache()
    weight_bytes = mx.get_active_memory() - idle_bytes
    mx.reset_peak_memory()
    prompt = [number % config["vocab_size"] for number in range(1, tokens + 1)]
    for step in steps(tokens, chunk):
        given = prompt[step.start : step.stop]
        if shard is not None:
            h = shard.forward(shard.embed(given), caches)
            out = shard.log_probabilities(h) if step.sample else None
        else:
            body = model if step.sample else model.model
            out = body(mx.array([given]), cache=caches)
            h = None
        if step.sample:
            mx.eval(out)
        mx.eval([layer_cache.state for layer_cache in caches])
        del h, out
        mx.clear_cache()
    return {
        "weight_bytes": weight_bytes,
        "answering_bytes": mx.get_active_memory() - idle_bytes,
        "peak_bytes": mx.get_peak_memory() - idle_bytes,
    }


if __name__ == "__main__":
    print(json.dumps(weigh(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
