"""The size of a model is known before it is pulled: from headers only, and not offline."""

from __future__ import annotations

import asyncio
import json
import struct

import pytest

from shoal_common.errors import Corrupt, HubUnavailable, NotFound, ShoalError, Unsupported
from shoal_common.messages.model_shape import GetModelShape, ModelSize
from shoal_common.models.model_shape import read_model_shape
from shoal_common.names import commit_of, is_commit, repo_of
from shoal_common.rpc.request_reply import RpcClient
from tests.fetcher.hub_repos import noise
from tests.fetcher.pull_site import Pulls, Site

CONFIG = {
    "model_type": "qwen3",
    "num_hidden_layers": 4,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
LAYER_BYTES = 700_000
ASK_S = 60.0


def weights(tensors: dict[str, int], seed: str) -> bytes:
    """A safetensors file."""
    header, at = {}, 0
    for name, size in tensors.items():
        header[name] = {"dtype": "BF16", "shape": [64, size // 128], "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + noise(at, seed)


def model(seed: str) -> dict[str, bytes]:
    """A model in two files."""
    layers = {f"model.layers.{i}.self_attn.q_proj.weight": LAYER_BYTES for i in range(4)}
    first = {"model.embed_tokens.weight": 128_000} | {k: v for k, v in layers.items() if k[13] in "01"}
    second = {k: v for k, v in layers.items() if k[13] in "23"} | {"model.norm.weight": 128}
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "model-00001-of-00002.safetensors": weights(first, f"{seed}1"),
        "model-00002-of-00002.safetensors": weights(second, f"{seed}2"),
        "consolidated.safetensors": b"not one that stages read",
    }


async def shape(here: Pulls, node: str, name: str) -> ModelSize:
    """Return the reply to `nats req` with this request."""
    return await RpcClient(here.here.nats)("fetcher", node, "shape", GetModelShape(model=name), ModelSize, ASK_S)


async def test_a_shape_comes_by_headers_alone_and_once_for_a_commit(site: Site) -> None:
    size_bytes = site.make(model(site.repo))
    async with site.join() as here:
        found = await shape(here, "a", site.repo)
        assert found.shape == read_model_shape(site.hub_root / site.repo)
        assert found.shape.layer_bytes == [LAYER_BYTES] * 4
        assert found.size_bytes == size_bytes
        assert repo_of(found.model) == site.repo and is_commit(commit_of(found.model))
        # Of 3 MB of weights the hub has sent the config and two headers.
        assert 0 < site.hub_bytes() < 4096
        gets = [site.gets(path) for path in model(site.repo)]
        assert gets == [1, 2, 2, 0]
        assert await shape(here, "a", found.model) == found
        assert [site.gets(path) for path in model(site.repo)] == gets
        # Nothing was pulled.
        assert await here.state_now("a") is None


@pytest.mark.parametrize(
    ("change", "error", "expected"),
    [
        ({"config.json": None}, Unsupported, "config.json"),
        ({"config.json": b"{"}, Corrupt, "config.json"),
        ({"config.json": b'{"model_type": "bert"}'}, Unsupported, "bert"),
        ({"model-00002-of-00002.safetensors": b"\xff" * 4096}, Corrupt, "header"),
        ({"model-00002-of-00002.safetensors": b"\x00\x10"}, Corrupt, "model-00002"),
        ({"model-00002-of-00002.safetensors": struct.pack("<Q", 5000) + b"{" * 900}, Corrupt, "5008"),
        ({"model-00001-of-00002.safetensors": None}, Unsupported, "layers"),
    ],
)
async def test_a_model_without_a_shape_reports_what_is_wrong_with_it(
    site: Site, change: dict[str, bytes | None], error: type[ShoalError], expected: str
) -> None:
    files = {**model(site.repo), **change}
    site.make({path: data for path, data in files.items() if data is not None})
    async with site.join() as here:
        with pytest.raises(error, match=expected):
            await shape(here, "a", site.repo)


async def test_what_the_hub_does_not_have_is_not_found(site: Site) -> None:
    async with site.join() as here:
        with pytest.raises(NotFound):
            await shape(here, "a", f"{site.repo}-nowhere")


async def test_offline_a_shape_is_refused_without_one_connection(site: Site) -> None:
    site.make(model(site.repo))
    connections = 0

    async def refuse(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, site.join() as here:
        try:
            await site["b"].restart(here.here, "fetcher", HF_HUB_OFFLINE="1", HF_ENDPOINT=url)
            with pytest.raises(HubUnavailable, match="HF_HUB_OFFLINE"):
                await shape(here, "b", site.repo)
            assert connections == 0
        finally:
            await site["b"].restart(here.here, "fetcher")
