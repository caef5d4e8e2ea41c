"""A model's layers and caches in numbers."""

from __future__ import annotations

from shoal_common.messages import WireStruct
from shoal_common.names import ModelId


class KvRule(WireStruct):
    """Size of one layer's KV cache for one sequence. All zero for a layer without a cache."""

    bytes_per_token: int = 0
    """Bytes per token of context."""
    window_tokens: int = 0
    """Maximum number of tokens that the layer keeps; 0 means the whole context."""
    constant_bytes: int = 0
    """Bytes that do not depend on the sequence's length: a recurrent state."""


class ModelShape(WireStruct):
    """What placement has to know about a model, read from its config and safetensors headers."""

    architecture: str
    """`model_type` of the model's config."""
    layer_bytes: list[int]
    """Tensor bytes of each layer, in order."""
    embed_bytes: int
    """Bytes of the embedding."""
    head_bytes: int
    """Bytes of the final norm and the head; a head tied to the embedding counts the embedding's bytes again."""
    kv_bytes_per_token_layer: int
    """KV cache bytes per token of the layer that needs most; `kv_rules` has each layer."""
    context_tokens: int
    """Maximum context length of the model."""
    hidden_bytes: int
    """Bytes of one token's hidden state."""
    tied: bool = False
    """Whether head and embedding are one tensor, which a stage with both holds once."""
    kv_rules: list[KvRule] = []
    """KV cache size of each layer, in order; empty from versions that apply `kv_bytes_per_token_layer` to all."""
    layer_active_bytes: list[int] = []
    """Bytes of each layer that one token reads: fewer than `layer_bytes` in a mixture of experts; empty: all."""
    chunk_bytes_per_token: int = 0
    """Activation bytes per token of a prefill chunk while a layer computes it."""
    context_bytes_per_token: int = 0
    """Bytes that a layer expands per token of context while it computes a chunk."""
    score_bytes: int = 0
    """Bytes of attention scores per token of the chunk and token of the context, where attention is not fused."""
    fused_score_bytes: int = 0
    """The same where attention is fused."""
    head_dim: int = 0
    """Dimension of the value heads, on which it depends whether attention is fused."""
    estimated: bool = False
    """The figures are an upper bound: the architecture is unknown, or loading changes the weights' size."""


class GetModelShape(WireStruct):
    """`svc.fetcher.<node>.shape`: size and shape of a model by the hub's listing and its files' headers."""

    model: str
    """`org/name@revision`; no node has to hold it."""


class ModelSize(WireStruct):
    """What a model needs that may be on no node yet. Nothing of it is verified."""

    model: ModelId
    """`org/name@commit`, with the commit that the revision means now."""
    size_bytes: int
    """Size of all its files."""
    shape: ModelShape
    """The model's shape."""
