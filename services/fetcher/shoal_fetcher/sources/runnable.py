"""Whether a model can run here, by the names of its files, so that a refusal comes before the bytes. Pure."""

from __future__ import annotations

from fnmatch import fnmatchcase

from shoal_common.messages.manifest import Manifest
from shoal_common.units import format_bytes
from shoal_fetcher.sources.leaf_selection import weight_files

_OTHER_FORMATS = {
    "GGUF": ("*.gguf", "*.ggml"),
    "PyTorch": ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt"),
    "ONNX": ("*.onnx",),
    "TensorFlow": ("*.h5", "*.tflite"),
    "Flax": ("*.msgpack",),
    "MLX npz": ("*.npz",),
    "a LoRA adapter": ("adapter_model.safetensors", "adapters.safetensors"),
    "Mistral's own": ("consolidated*.safetensors",),
}
"""Formats of weights that no stage reads, with the names of their files."""


def unsupported_format(manifest: Manifest) -> str:
    """Return which formats a model's weights are in, if stages read none of them; else ""."""
    if weight_files(manifest):
        return ""
    names = [file.path.rpartition("/")[2] for file in manifest.files]
    found = [
        format_name
        for format_name, patterns in _OTHER_FORMATS.items()
        if any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
    ]
    return ", ".join(found)


def unsupported_message(manifest: Manifest, formats: str) -> str:
    """Return why a model is not fetched, and how it is all the same."""
    return (
        f"{manifest.repo} cannot run here: its weights are {formats}, and Shoal runs model*.safetensors; "
        f"nothing was downloaded: look for a safetensors or MLX version of it, or fetch its "
        f"{format_bytes(manifest.size_bytes)} all the same with --force"
    )
