"""Python's startup hook of the one node that bench/transfer.py measures without hashing: same code, known hashes.

On that node's path only, it replaces BLAKE3 and SHA-256 for bytes whose digests the benchmark has computed before,
recognized by their first 32 bytes. All other bytes are hashed as usual, so that the node works.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import blake3 as _module

_MARK_BYTES = 32
_real: dict[str, Any] = {"blake3": _module.blake3, "sha256": hashlib.sha256}
_known: dict[str, dict[str, str]] = json.loads(Path(os.environ["SHOAL_BENCH_DIGESTS"]).read_text())
"""By algorithm: digests as hex, by the first bytes as hex."""


class _Hash:
    """A hash of known bytes, or a real one."""

    def __init__(self, algorithm: str, data: Any = b"", **options: Any) -> None:
        self._algorithm, self._options = algorithm, options
        self._digest = ""
        self._actual: Any = None
        if len(data):
            self.update(data)

    def update(self, data: Any) -> _Hash:
        """Add bytes; known ones are ignored."""
        if self._digest:
            return self
        if self._actual is None:
            self._digest = _known[self._algorithm].get(bytes(data[:_MARK_BYTES]).hex(), "")
            if self._digest:
                return self
            self._actual = _real[self._algorithm](**self._options)
        self._actual.update(data)
        return self

    def hexdigest(self, *arguments: int) -> str:
        """Return the digest as hex."""
        return self._digest or self._finished().hexdigest(*arguments)

    def digest(self, *arguments: int) -> bytes:
        """Return the digest."""
        return bytes.fromhex(self._digest) if self._digest else self._finished().digest(*arguments)

    def copy(self) -> _Hash:
        """Return a copy in the same state."""
        other = _Hash(self._algorithm, **self._options)
        other._digest = self._digest
        other._actual = self._actual.copy() if self._actual is not None else None
        return other

    def _finished(self) -> Any:
        return self._actual if self._actual is not None else _real[self._algorithm](**self._options)


def _blake3(data: Any = b"", **options: Any) -> _Hash:
    return _Hash("blake3", data, **options)


def _sha256(data: Any = b"", **options: Any) -> _Hash:
    return _Hash("sha256", data, **options)


setattr(_module, "blake3", _blake3)  # noqa: B010  # a function in a class's place is what no type allows
setattr(hashlib, "sha256", _sha256)  # noqa: B010
