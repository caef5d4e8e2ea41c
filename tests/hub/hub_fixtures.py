"""The files of the repository that the tests of the hub serve."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

MODEL = "toy/numbers"


LFS_FROM_BYTES = 1 << 16


LARGE = random.Random(1).randbytes(3 * (1 << 20) + 12345)


FILES = {
    "README.md": b"# numbers\n",
    "config.json": b'{"model_type": "none"}\n',
    "empty.txt": b"",
    "weights.bin": LARGE,
    "tiny.safetensors": b"small, and large by its name",
    "sub/deep/one.txt": b"one",
    "sub/two.txt": b"two",
    "with space & ümlaut.txt": b"three",
}


def write_files(directory: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def read_files(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def resolve(path: str, revision: str = "main") -> str:
    return f"/{MODEL}/resolve/{revision}/{path}"
