"""Which models are said to be in a format that cannot run here, by the names of their files."""

from __future__ import annotations

import pytest

from shoal_common.messages.manifest import Manifest, ManifestFile
from shoal_fetcher.sources.runnable import unsupported_format, unsupported_message


def manifest(*paths: str) -> Manifest:
    files = [ManifestFile(path=path, size_bytes=5_000_000_000, sha256="a" * 64) for path in paths]
    return Manifest(repo="org/name", commit="c" * 40, files=files)


@pytest.mark.parametrize(
    ("paths", "formats"),
    [
        (("model-Q4_K_M.gguf", "README.md"), "GGUF"),
        (("sub/model.gguf", "config.json"), "GGUF"),
        (("pytorch_model-00001-of-00002.bin", "config.json"), "PyTorch"),
        (("onnx/model.onnx", "pytorch_model.bin", "config.json"), "PyTorch, ONNX"),
        (("adapter_model.safetensors", "adapter_config.json"), "a LoRA adapter"),
        (("consolidated.safetensors", "params.json"), "Mistral's own"),
        (("model.safetensors", "model.gguf", "pytorch_model.bin"), ""),
        (("model-00001-of-00002.safetensors", "config.json"), ""),
        (("config.json", "tokenizer.json"), ""),
        (("data.bin", "README.md"), ""),
    ],
)
def test_a_format_that_no_stage_reads_is_known_by_names(paths: tuple[str, ...], formats: str) -> None:
    assert unsupported_format(manifest(*paths)) == formats


def test_the_refusal_names_format_size_and_the_way_around() -> None:
    message = unsupported_message(manifest("model.gguf"), "GGUF")
    assert "GGUF" in message and "5.0 GB" in message and "--force" in message and "nothing was downloaded" in message
