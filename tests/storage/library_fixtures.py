"""Libraries for tests: caches as huggingface_hub makes them, and a snapshot of a whole library for comparison."""

from __future__ import annotations

import json
import os
import stat
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest
from nats.js.errors import NotFoundError

from shoal_common.bus.keys import model_key
from shoal_common.messages.storage import LibraryState, ModelState
from shoal_common.names import ModelId
from tests.fileserver.running_fileserver import Fileserver
from tests.harness.nats import NatsServer
from tests.harness.process import Process
from tests.harness.waiting import eventually
from tests.storage.running_storage import Node, on_node
from tests.storage.store_fixtures import Model, git_sha1, sha256


def config() -> bytes:
    """A file that every model has and that is named by its git sha1."""
    return b'{"model_type": "none"}'


def safetensors(data: bytes, *, claimed_bytes: int | None = None) -> bytes:
    """A safetensors file of one tensor with this data; its header claims as many bytes, unless told otherwise."""
    size = len(data) if claimed_bytes is None else claimed_bytes
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + data


def cached(root: Path, repo: str, commit: str, files: Mapping[str, bytes], refs: tuple[str, ...] = ("main",)) -> Path:
    """A model as huggingface_hub leaves it in its cache: large files by sha256, the others by git sha1."""
    top = root / f"models--{repo.replace('/', '--')}"
    snapshot = top / "snapshots" / commit
    (top / "blobs").mkdir(parents=True, exist_ok=True)
    for path, data in files.items():
        etag = git_sha1(data) if path.endswith((".json", ".md")) else sha256(data)
        (top / "blobs" / etag).write_bytes(data)
        link = snapshot / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(top / "blobs" / etag, link.parent))
    for name in refs:
        ref = top / "refs" / name
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)
    return snapshot


def plain(root: Path, repo: str, files: Mapping[str, bytes]) -> Path:
    """A model as a plain directory."""
    for path, data in files.items():
        file = root / repo / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return root / repo


def snapshot_tree(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything in a library, itself included, that must not change: names, types, contents, modes, times, links."""
    found: dict[str, tuple[object, ...]] = {}
    for path in (root, *sorted(root.rglob("*"))):
        at = path.lstat()
        content: object = None
        if path.is_symlink():
            content = str(path.readlink())
        elif stat.S_ISREG(at.st_mode):
            content = sha256(path.read_bytes())
        found[str(path)] = (at.st_mode, at.st_nlink, at.st_ino, at.st_mtime_ns, at.st_ctime_ns, at.st_size, content)
    return found


@contextmanager
def mounted_read_only(root: Path) -> Iterator[Path]:
    """The same directory as a read-only mount, as a NAS may be mounted. Skips where that is not possible."""
    at = root.with_name(f"{root.name}-ro")
    at.mkdir()
    if sys.platform != "linux" or _mount("--bind", str(root), str(at)):
        pytest.skip("a read-only bind mount cannot be had here: what a root is kept from is not tested")
    try:
        assert not _mount("-o", "remount,bind,ro", str(at))
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def _mount(*arguments: str) -> int:
    return subprocess.run(["mount", *arguments], check=False, capture_output=True).returncode


WEIGHTS = safetensors(bytes(range(256)) * 9000)


FILES = {"config.json": config(), "model.safetensors": WEIGHTS, "sub/more.safetensors": safetensors(b"m" * 50)}


THEIRS = Model("org/theirs", FILES)


OURS = Model("org/ours", {"model.safetensors": WEIGHTS, "own.bin": b"own" * 100})
"""A model that shares its weights with the library model."""


@asynccontextmanager
async def on_node_with(nats: NatsServer, tmp_path: Path, name: str, *libraries: Path) -> AsyncIterator[Node]:
    """A node with these libraries in its settings file."""
    async with on_node(nats, tmp_path, name) as node:
        listed = ", ".join(f'"{root}"' for root in libraries)
        with (node.home / "node.toml").open("a") as f:
            f.write(f"# mine\n[storage]\n# theirs\nlibraries = [{listed}]  # the NAS\n")
        yield node


@asynccontextmanager
async def listening(node: Node, **environ: str) -> AsyncIterator[Process]:
    """Run storage, once it waits for commands: one sent earlier is executed, but its reply is lost."""
    async with node.storage(**environ) as process:

        async def waits() -> bool:
            with suppress(NotFoundError):
                return bool((await node.here.js.consumer_info("CMD", f"storage-{node.node}")).num_waiting)
            return False

        await eventually(waits, "storage waits for commands")
        yield process


async def wait_published(node: Node, model: ModelId) -> ModelState:
    """Wait until a model (`org/name@commit`) is published."""

    async def published() -> ModelState | None:
        return await node.here.buckets.state.get_as(model_key(node.node, model), ModelState)

    return await eventually(published, f"{model} is announced")


async def wait_library_state(node: Node, wanted: Callable[[LibraryState], bool], at: int = 0) -> LibraryState:
    """Wait until the published state of a library is as expected."""

    async def matching_state() -> LibraryState | None:
        libraries = (await node.storage_state()).libraries
        return libraries[at] if len(libraries) > at and wanted(libraries[at]) else None

    return await eventually(matching_state, "the root is as wanted")


async def set_libraries(node: Node, *libraries: Path) -> None:
    """Set the libraries, which also has them scanned again."""
    outcome = await node.set_directories(libraries=libraries)
    assert outcome.ok, outcome.error
    assert outcome.result["libraries"] == [str(r) for r in libraries]


async def wait_unpublished(node: Node, model: ModelId) -> None:
    """Wait until a model is unpublished."""

    async def unpublished() -> bool:
        return await node.here.buckets.state.get(model_key(node.node, model)) is None

    await eventually(unpublished, f"{model} is unpublished")


async def is_served(fileserver: Fileserver, data: bytes) -> bool:
    reply = await fileserver.blob(sha256(data))
    assert reply.status in (200, 404)
    assert reply.status == 404 or reply.body == data
    return reply.status == 200


def hashed(process: Process) -> list[str]:
    """The log lines about hashed models."""
    return [line for line in process.lines if "library model hashed" in line]
