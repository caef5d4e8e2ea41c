"""How much memory a model needs on its nodes, and how much of a node is reserved (docs/memory.md). Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from shoal_common.messages.instances import InstanceSpec
from shoal_common.messages.liveness import NodeFacts
from shoal_common.messages.model_shape import KvRule, ModelShape
from shoal_common.messages.storage import ModelState
from shoal_common.models.kv_cache import KV_CACHE_STEP_TOKENS, MAX_REQUESTS_PER_INSTANCE, cache_steps
from shoal_placement.solver import ModelNeed, slice_bytes
from shoal_placement.solver.build_problem import DEFAULT_BANDWIDTH_BYTES_PER_S

PREFILL_CHUNK_TOKENS = 2048
"""The longest chunk of a prompt that a stage computes at once: `prefill_chunk_tokens` of its Start."""
STAGE_OVERHEAD_BYTES = 96 << 20
"""Python, MLX and the tokenizer in a stage's process: 88 MiB resident were measured with a tiny model."""
_FUSED_HEAD_DIMS = (64, 80, 128)
"""Head sizes of the values for which MLX on Metal computes attention without writing the scores to memory."""


def cache_rules(shape: ModelShape) -> Sequence[KvRule]:
    """Return one cache rule per layer; a shape from an earlier version has one rule for all."""
    return shape.kv_rules or [KvRule(bytes_per_token=shape.kv_bytes_per_token_layer)] * len(shape.layer_bytes)


def cached_tokens(rule: KvRule, context_tokens: int) -> int:
    """Return the tokens that a layer's cache holds when an answer has filled the context."""
    tokens = cache_steps(context_tokens) * KV_CACHE_STEP_TOKENS
    return min(tokens, rule.window_tokens) if rule.window_tokens else tokens


def max_cached_tokens(rule: KvRule, context_tokens: int, chunk_tokens: int) -> int:
    """Return the most tokens that a layer's cache ever holds: a window is cut to its length with the first token of
    the answer, and until then it holds a whole chunk more."""
    if not rule.window_tokens:
        return cached_tokens(rule, context_tokens)
    return max(cached_tokens(rule, context_tokens), min(context_tokens, rule.window_tokens - 1 + chunk_tokens))


def cache_bytes(rule: KvRule, context_tokens: int, chunk_tokens: int, answers: int, requests: int) -> int:
    """Return the most bytes that a layer's caches take.

    They hold `answers` as long as the context, or up to `requests` that share that budget. What grows with the tokens
    is the same for any number of requests; each request has its own window, and its own state.
    """
    requests = max(requests, answers)
    tokens = answers * cache_steps(context_tokens) * KV_CACHE_STEP_TOKENS
    if rule.window_tokens:
        tokens = min(tokens, requests * max_cached_tokens(rule, context_tokens, chunk_tokens))
    return rule.bytes_per_token * tokens + requests * rule.constant_bytes


def pass_bytes(shape: ModelShape, context_tokens: int, fused: bool, chunk_tokens: int = PREFILL_CHUNK_TOKENS) -> int:
    """Return the temporary bytes of a stage while it computes the last chunk of a prompt as long as the context.

    Layers are computed one at a time: activations, scores, and the layer's cache once more, which is copied when it
    grows. Passes run one at a time too, however many requests are in flight.
    """
    chunk = min(chunk_tokens, context_tokens)
    rules = cache_rules(shape)
    attended = max((max_cached_tokens(r, context_tokens, chunk) for r in rules if r.bytes_per_token), default=0)
    copied = max((r.bytes_per_token * max_cached_tokens(r, context_tokens, chunk) for r in rules), default=0)
    scores = shape.fused_score_bytes if fused else shape.score_bytes
    if not (shape.chunk_bytes_per_token or scores):
        return 0  # a shape from an earlier version, which counted none of this
    activations = chunk * shape.chunk_bytes_per_token + attended * shape.context_bytes_per_token
    return activations + chunk * attended * scores + copied


def fuses_attention(shape: ModelShape, facts: NodeFacts) -> bool:
    """Return whether a node computes attention without writing the scores to memory."""
    return facts.accelerator == "metal" and shape.head_dim in _FUSED_HEAD_DIMS


def model_need(
    shape: ModelShape,
    context_tokens: int,
    answers: int = 1,
    requests: int = MAX_REQUESTS_PER_INSTANCE,
    fused: bool = True,
    chunk_tokens: int = PREFILL_CHUNK_TOKENS,
) -> ModelNeed:
    """Return what a model needs with this much context for each of `answers`; up to `requests` share that budget.

    On a node that does not fuse attention every stage takes `unfused_bytes` more.
    """
    chunk = min(chunk_tokens, context_tokens)
    return ModelNeed(
        layer_bytes=[
            weights + cache_bytes(r, context_tokens, chunk, answers, requests)
            for weights, r in zip(shape.layer_bytes, cache_rules(shape), strict=True)
        ],
        embed_bytes=shape.embed_bytes,
        head_bytes=shape.head_bytes,
        tied=shape.tied,
        stage_bytes=STAGE_OVERHEAD_BYTES + pass_bytes(shape, context_tokens, fused, chunk_tokens),
        weight_bytes=shape.layer_bytes,
        layer_work_bytes=shape.layer_active_bytes or shape.layer_bytes,
    )


def unfused_bytes(shape: ModelShape, context_tokens: int, facts: NodeFacts) -> int:
    """Return the bytes that a stage takes on this node beyond what it takes where attention is fused."""
    if fuses_attention(shape, facts):
        return 0
    return pass_bytes(shape, context_tokens, False) - pass_bytes(shape, context_tokens, True)


def read_bandwidth_bytes_per_s(facts: NodeFacts) -> float:
    """Return the rate at which a node reads weights: observed in its stages, else measured idle, else the default."""
    return facts.observed_bandwidth_bytes_per_s or facts.idle_bandwidth_bytes_per_s or DEFAULT_BANDWIDTH_BYTES_PER_S


def stage_key(instance: str, rank: int) -> str:
    """Return the key of a stage in `NodeFacts.stages`."""
    return f"{instance}/{rank}"


def reserved_bytes(
    instances: Iterable[InstanceSpec], models: Iterable[ModelState], facts: Mapping[str, NodeFacts]
) -> dict[str, dict[str, int]]:
    """Return the memory reserved for placed instances: for each node its stages' bytes, by `stage_key`."""
    shapes = {m.model: m.shape for m in models if m.shape is not None}
    reserved: dict[str, dict[str, int]] = {}
    for spec in instances:
        shape = shapes.get(spec.model)
        if shape is None:
            continue
        need = model_need(shape, spec.context_tokens, spec.constraints.max_parallel_answers)
        for stage in spec.stages:
            size_bytes = slice_bytes(need, stage.first_layer, stage.last_layer)
            size_bytes += unfused_bytes(shape, spec.context_tokens, facts.get(stage.node, NodeFacts()))
            reserved.setdefault(stage.node, {})[stage_key(spec.id, stage.rank)] = size_bytes
    return reserved
