"""What is fuzzed: a parser of something from outside, the errors that it may raise, and what it must keep."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from shoal_common.errors import ShoalError

CORPUS = Path(__file__).parent / "corpus"
JSON_PIECES = (
    b'{"', b'":', b"[]", b"{}", b"null", b"true", b"-1", b"1e999", b"NaN", b'"\\ud800"', b"9" * 25, b"[" * 200,
    b"\\u0000", b"-0", b"1.5", b'""',
)  # fmt: skip
"""What JSON is made of, and what upsets a reader of it."""


class Parser(msgspec.Struct, frozen=True):
    """A parser of bytes from outside."""

    name: str
    parse: Callable[[bytes], object]
    """Parses, and asserts what must hold of the result."""
    pieces: tuple[bytes, ...] = ()
    """Pieces that mean something to it."""
    errors: tuple[type[Exception], ...] = (ShoalError,)
    """What it is documented to raise."""

    @property
    def directory(self) -> Path:
        """Where its corpus is kept."""
        return CORPUS / self.name

    def corpus(self) -> list[bytes]:
        """Return the inputs that are kept: valid ones, and those that have shown something."""
        return [path.read_bytes() for path in sorted(self.directory.iterdir())]

    def run(self, data: bytes) -> None:
        """Parse. Raises what is not documented."""
        with suppress(*self.errors):
            self.parse(data)


def text_of(data: bytes) -> str:
    """Return any bytes as text, as what was read with `surrogateescape` or as latin-1 never is."""
    return data.decode(errors="replace")


def json_or_none(data: bytes) -> object:
    """Return a JSON document, or None."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None
