"""The cluster's models, downloaded with the unmodified huggingface_hub client."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from urllib.parse import urlencode

import httpx2
import pytest
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from msgspec import structs

from shoal_common.bus.keys import model_key
from shoal_common.messages.manifest import Manifest, ManifestFile
from shoal_common.messages.storage import GetManifest, ModelState
from shoal_common.names import ModelRef
from shoal_common.rpc.request_reply import RpcEndpoint, serve
from shoal_fileserver.model_index import holders
from tests.fileserver.running_fileserver import Fileserver, admitted, serving
from tests.harness.fresh import Fresh
from tests.harness.identities import Authority
from tests.harness.nats import Joined, NatsServer, joined
from tests.harness.waiting import eventually

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": bytes(range(256)) * 9000,
    "onnx/a b/weights.bin": b"deep" * 1000,
    "onnx/empty.txt": b"",
}
SMALL = ("config.json", "onnx/empty.txt")
KEY = f"shoal-{'k' * 43}"


def git_sha1(data: bytes) -> str:
    """Return git's hash of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def manifest_of(repo: str) -> Manifest:
    """A model with these files; the small ones have git's sha1, as the hub lists them."""
    return Manifest(
        repo=repo,
        commit=hashlib.sha1(repo.encode(), usedforsecurity=False).hexdigest(),
        revisions=["main", "refs/pr/1"],
        files=[
            ManifestFile(
                path=path,
                size_bytes=len(data),
                sha256=hashlib.sha256(data).hexdigest(),
                git_sha1=git_sha1(data) if path in SMALL else "",
            )
            for path, data in FILES.items()
        ],
    )


@asynccontextmanager
async def holding(here: Joined, node: str, manifest: Manifest) -> AsyncIterator[None]:
    """Publish what the storage of a node with the model would, while the body runs."""

    async def answer(question: GetManifest) -> Manifest:
        assert question.model == manifest.model
        return manifest

    state = ModelState(
        node=node,
        repo=manifest.repo,
        commit=manifest.commit,
        size_bytes=manifest.size_bytes,
        file_count=len(manifest.files),
        revisions=manifest.revisions,
        ready_at_s=1.0,
    )
    stopping = asyncio.Event()
    answering = asyncio.create_task(
        serve(here.nats, "storage", node, {"manifest": RpcEndpoint(GetManifest, answer)}, stopping)
    )
    await here.buckets.state.put(model_key(node, manifest.model), state)
    try:
        yield
    finally:
        stopping.set()
        await answering


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Run `snapshot_download` with a new cache each time."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def download(server: Fileserver, repo: str, **named: object) -> Path:
        cache = tmp_path / f"cache-{time.monotonic_ns()}"
        endpoint = f"http://{server.host}:{server.port}"
        named.setdefault("token", False)
        return Path(snapshot_download(repo, cache_dir=cache, endpoint=endpoint, **named))  # type: ignore[call-overload]

    return download


def check_files(found: Path) -> None:
    """Check that all files are there, byte for byte."""
    assert {str(p.relative_to(found)) for p in found.rglob("*") if p.is_file()} == FILES.keys()
    assert all((found / path).read_bytes() == data for path, data in FILES.items())


async def wait_listed(server: Fileserver, repo: str, **headers: str) -> None:
    """Wait until the fileserver knows the model."""

    async def known() -> bool:
        return (await server.ask(f"/api/models/{repo}", headers)).status == 200

    await eventually(known, "the fileserver knows the model")


async def test_an_unmodified_client_downloads_a_model_of_this_node(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, client: Callable[..., Path]
) -> None:
    node, manifest = fresh("files"), manifest_of(f"org/{fresh('model')}")
    async with joined(nats) as here, serving(nats, tmp_path, node) as server, holding(here, node, manifest):
        for data in FILES.values():
            server.add(data)
        await wait_listed(server, manifest.repo)
        found = await asyncio.to_thread(client, server, manifest.repo)
        check_files(found)
        assert found.name == manifest.commit
        blobs = {p.name for p in (found.parents[1] / "blobs").iterdir()}
        # As after a download from the hub, so that neither fetches again what the other has.
        assert blobs == {f.git_sha1 or f.sha256 for f in manifest.files}
        check_files(await asyncio.to_thread(client, server, manifest.repo, revision="refs/pr/1"))
        check_files(await asyncio.to_thread(client, server, manifest.repo, revision=manifest.commit))
        api = HfApi(endpoint=f"http://{server.host}:{server.port}", token=False)
        top = await asyncio.to_thread(lambda: list(api.list_repo_tree(manifest.repo)))
        assert [e.path for e in top] == ["onnx", "config.json", "model.safetensors"]
        below = await asyncio.to_thread(lambda: list(api.list_repo_tree(manifest.repo, "onnx", recursive=True)))
        assert [e.path for e in below] == ["onnx/a b/weights.bin", "onnx/empty.txt"]


async def test_another_nodes_model_is_redirected_to_by_a_signed_url(
    members_nats: NatsServer, authority: Authority, fresh: Fresh, tmp_path: Path, client: Callable[..., Path]
) -> None:
    near, far, manifest = fresh("near"), fresh("far"), manifest_of(f"org/{fresh('model')}")
    await admitted(members_nats, authority, tmp_path, near, far)
    for node in (near, far):
        (tmp_path / node / "api.key").write_text(f"{KEY}\n")
    async with AsyncExitStack() as stack:
        here = await stack.enter_async_context(joined(members_nats))
        server = await stack.enter_async_context(serving(members_nats, tmp_path, near))
        holder = await stack.enter_async_context(serving(members_nats, tmp_path, far))
        await stack.enter_async_context(holding(here, far, manifest))
        for data in FILES.values():
            holder.add(data)
        await wait_listed(server, manifest.repo, Authorization=f"Bearer {KEY}")
        await wait_listed(holder, manifest.repo, Authorization=f"Bearer {KEY}")
        check_files(await asyncio.to_thread(client, server, manifest.repo, token=KEY))
        path = f"/{manifest.repo}/resolve/main/config.json"
        sent = await server.ask(path, {"Authorization": f"Bearer {KEY}"})
        assert sent.status == 302 and sent.headers["x-linked-size"] == str(len(FILES["config.json"]))
        address = httpx2.URL(sent.headers["location"])
        assert (address.scheme, address.host, address.port) == ("http", holder.host, holder.port)
        # The URL alone allows reading this file, and no other.
        target = address.raw_path.decode()
        assert (await holder.ask(target)).body == FILES["config.json"]
        assert (await holder.ask(target.replace("config.json", "model.safetensors"))).status == 401
        assert (await holder.ask(target.replace("config.json", "nothing.json"))).status == 401
        assert (await holder.ask(target.partition("?")[0])).status == 401
        assert (await server.ask(target)).status == 401


async def test_I12_without_the_nodes_key_the_hub_protocol_is_closed(
    members_nats: NatsServer, authority: Authority, fresh: Fresh, tmp_path: Path
) -> None:
    node, manifest = fresh("files"), manifest_of(f"org/{fresh('model')}")
    peer, _ = await admitted(members_nats, authority, tmp_path, fresh("peer"), node)
    (tmp_path / node / "api.key").write_text(KEY)
    async with AsyncExitStack() as stack:
        here = await stack.enter_async_context(joined(members_nats))
        server = await stack.enter_async_context(serving(members_nats, tmp_path, node))
        await stack.enter_async_context(holding(here, node, manifest))
        blob = server.add(FILES["config.json"])
        await wait_listed(server, manifest.repo, Authorization=f"Bearer {KEY}")
        file = f"/{manifest.repo}/resolve/main/config.json"
        now = int(time.time())
        paths = (f"/api/models/{manifest.repo}", f"/api/models/{manifest.repo}/tree/main", file, "/api/models/a/b")
        for path in paths:
            for credential in ({}, {"Authorization": "Bearer hf_x"}, peer.token(node, blob, now)):
                assert (await server.ask(path, credential)).status == 401, (path, credential)
        for until, shown in ((now + 60, 200), (now - 60, 401)):
            query = peer.signed_query(node, blob, until)
            assert (await server.ask(f"{file}?{urlencode(query)}")).status == shown
            assert (await server.ask(f"{file}?{urlencode({**query, 'node': node})}")).status == 401
        # Nor does that key allow what peers request.
        assert (await server.ask(f"/v1/blobs/{blob}", {"Authorization": f"Bearer {KEY}"})).status == 401


async def test_what_is_not_there_is_named_as_the_client_understands_it(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, client: Callable[..., Path]
) -> None:
    node, manifest = fresh("files"), manifest_of(f"org/{fresh('model')}")
    async with joined(nats) as here, serving(nats, tmp_path, node) as server, holding(here, node, manifest):
        await wait_listed(server, manifest.repo)
        with pytest.raises(RepositoryNotFoundError):
            await asyncio.to_thread(client, server, "org/never-was")
        with pytest.raises(RevisionNotFoundError):
            await asyncio.to_thread(client, server, manifest.repo, revision="v9")
        with pytest.raises(LocalEntryNotFoundError):  # published, but its bytes are gone
            await asyncio.to_thread(client, server, manifest.repo)
        missing = await server.ask(f"/{manifest.repo}/resolve/main/no/such.file")
        assert (missing.status, missing.headers["x-error-code"]) == (404, "EntryNotFound")
        for hostile in (
            "..%2f..%2fetc/passwd",
            "org/%2e%2e/resolve/main/x",
            "a/b/resolve/main/../../x",
            "a/b/tree/x",
        ):
            assert (await server.ask(f"/{hostile}")).status in (404, 401), hostile


def test_of_two_commits_the_newest_wins_and_this_node_is_first() -> None:
    def held(node: str, digit: str, ready_at_s: float) -> ModelState:
        state = ModelState(node=node, repo="org/m", commit=digit * 40, size_bytes=1, file_count=1)
        return structs.replace(state, revisions=["main"], ready_at_s=ready_at_s)

    models = [held("a", "1", 5.0), held("b", "2", 9.0), held("c", "2", 7.0), held("gone", "3", 99.0)]

    def meant(name: str) -> list[str]:
        return [m.node for m in holders(ModelRef.parse(name), models, {"a", "b", "c"}, "c")]

    assert meant("org/m") == ["c", "b"]
    assert meant(f"org/m@{'1' * 40}") == ["a"]
    assert meant("org/m@v2") == meant("org/other") == []
