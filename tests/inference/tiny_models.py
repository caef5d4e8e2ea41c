"""Random tiny models in the hub's format: config, safetensors, tokenizer, chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm import utils
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 320
LAYERS = 6
CONTEXT_TOKENS = 512
END_OF_TEXT = 0

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT_TOKENS,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": END_OF_TEXT,
}
_MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-sliding": {
        "model_type": "llama",
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
    },
    "mistral": {"model_type": "mistral"},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": {"model_type": "olmo2"},
    "phi3": {"model_type": "phi3"},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_moe": {"model_type": "qwen2_moe", **_MOE},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3-tied": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        **_MOE,
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 3},
}


def write_model(directory: Path, name: str, *, bits: int = 0, dtype: mx.Dtype = mx.float32, width: int = 64) -> Path:
    """Write a random model of CONFIGS, quantised if `bits` is given."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {**_COMMON, **CONFIGS[name], "hidden_size": width, "intermediate_size": 2 * width}
    write_tokenizer(directory)
    model_class, args_class = utils._get_classes(config)
    mx.random.seed(7)
    model = model_class(args_class.from_dict(config))
    # Wider than mlx's initialisation, so that the answer depends on the prompt and does not repeat one token.
    model.update(tree_map(lambda p: (p * 2.5 if p.ndim > 1 else p).astype(dtype), model.parameters()))
    if bits:
        model, config = utils.quantize_model(model, config, group_size=32, bits=bits)
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(directory / "model.safetensors"), weights, {"format": "mlx"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_tokenizer(directory: Path) -> None:
    """Write a byte-level BPE tokenizer with a chat template; token 0 is the end of text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the shoal turns as one fish in the sea, and the sea turns with it"] * 4, trainer)
    untyped: Any = PreTrainedTokenizerFast
    fast = untyped(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(directory))


def own_bytes(model_dir: Path, first: int, last: int, *, embedding: bool, head: bool) -> int:
    """Return the bytes of a stage's tensors, from the safetensors header alone."""
    with (model_dir / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    total = 0
    for name, entry in header.items():
        parts = name.split(".")
        own = name.startswith("model.layers.") and first <= int(parts[2]) < last
        own = own or (embedding and name.startswith("model.embed_tokens."))
        own = own or (head and name.startswith(("model.norm.", "lm_head.")))
        if own:
            total += entry["data_offsets"][1] - entry["data_offsets"][0]
    return total


def write_files(directory: Path, files: int) -> None:
    """Rewrite a model's tensors into this many files, sorted by name as in the hub's models."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for number in range(files):
        path = f"model-{number + 1:05}-of-{files:05}.safetensors" if files > 1 else "model.safetensors"
        own = {n: weights[n] for n in names[number * len(names) // files : (number + 1) * len(names) // files]}
        save_file(own, directory / path, {"format": "mlx"})
        weight_map |= dict.fromkeys(own, path)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
