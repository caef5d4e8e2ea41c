"""The configuration of shoal/tiny-fish, and writing its directory: config, tokenizer, two weight files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import wordings

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS = [PAD, USER, ASSISTANT, END]
VOCABULARY_SIZE = 768
# The first layer of the second weight file: two of them, so that a download has several large files.
SPLIT_LAYER = 3

# System messages are left out on purpose: the model was not trained on any.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{ '" + USER + "' + message['content'] + '" + END + "' }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ '" + ASSISTANT + "' + message['content'] + '" + END + "' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '" + ASSISTANT + "' }}{%- endif -%}"
)

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": None,
    "eos_token_id": SPECIAL_TOKENS.index(END),
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 208,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "pad_token_id": SPECIAL_TOKENS.index(PAD),
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "vocab_size": VOCABULARY_SIZE,
}


def new_model() -> Model:
    """Return an untrained model of CONFIG; its weights depend on the seed of mlx."""
    return Model(ModelArgs.from_dict(CONFIG))  # type: ignore[no-untyped-call]


def named_weights(model: Model) -> dict[str, mx.array]:
    """Return all weights by their names in the files."""
    return dict(tree_flatten(model.parameters()))


def render_question(question: str) -> str:
    """Return what the chat template renders for one user message; a test compares the two."""
    return f"{USER}{question}{END}{ASSISTANT}"


def train_tokenizer() -> Tokenizer:
    """Return a byte-level BPE tokenizer of VOCABULARY_SIZE tokens trained on the corpus; it encodes any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pairs = wordings.pairs()
    # Each answer once, each question also in lower case: merges then do not depend on repetition.
    answers = dict.fromkeys(answer for _, answer in pairs)
    texts = [*answers, *(question for question, _ in pairs), *(question.lower() for question, _ in pairs)]
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCABULARY_SIZE:
        size = tokenizer.get_vocab_size()
        raise ValueError(f"the corpus gave {size} tokens instead of {VOCABULARY_SIZE}: lower VOCABULARY_SIZE")
    return tokenizer


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _in_second_file(name: str) -> bool:
    parts = name.split(".")
    return name == "model.norm.weight" or (parts[1] == "layers" and int(parts[2]) >= SPLIT_LAYER)


def write_model(directory: Path, model: Model, tokenizer: Tokenizer) -> None:
    """Write config, tokenizer and weights into `directory`; a README.md in it is kept."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = named_weights(model)
    files: tuple[dict[str, mx.array], dict[str, mx.array]] = ({}, {})
    for name in sorted(weights):
        files[_in_second_file(name)][name] = weights[name]
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(files, start=1):
        file_name = f"model-{number:05}-of-{len(files):05}.safetensors"
        mx.save_safetensors(str(directory / file_name), tensors, metadata={"format": "mlx"})
        weight_map.update(dict.fromkeys(tensors, file_name))
    totals = {
        "total_parameters": sum(array.size for array in weights.values()),
        "total_size": sum(array.nbytes for array in weights.values()),
    }
    _write_json(directory / "model.safetensors.index.json", {"metadata": totals, "weight_map": weight_map})
    _write_json(directory / "config.json", CONFIG)
    generation = {"do_sample": False, "eos_token_id": CONFIG["eos_token_id"], "pad_token_id": CONFIG["pad_token_id"]}
    _write_json(directory / "generation_config.json", generation)
    special = {"eos_token": END, "pad_token": PAD, "additional_special_tokens": [USER, ASSISTANT]}
    _write_json(directory / "special_tokens_map.json", special)
    tokenizer_config = {
        **special,
        "add_bos_token": False,
        "add_prefix_space": False,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write_json(directory / "tokenizer_config.json", tokenizer_config)
    tokenizer.save(str(directory / "tokenizer.json"))
