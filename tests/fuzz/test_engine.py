"""The engine finds what it looks for: an error of another kind, an input that takes too long, one that takes much."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest

from tests.fuzz import engine
from tests.fuzz.engine import TooLarge, TooSlow, fuzz
from tests.fuzz.parser_under_test import Parser


class OneInput(Parser, frozen=True):
    """A parser with a corpus of one input."""

    def corpus(self) -> list[bytes]:
        return [b"valid"]


def refuse(data: bytes) -> None:
    if data.endswith(b"!"):
        raise KeyError("undocumented")
    raise ValueError("documented")


def hang(data: bytes) -> None:
    while data.endswith(b"!"):
        with suppress(Exception):  # as a parser might
            sum(range(1000))


def take_memory(data: bytes) -> None:
    if data.endswith(b"!"):
        assert len(bytearray(b"x") * (200 << 20))


@pytest.mark.parametrize(
    ("parse", "error", "shown"),
    [
        (refuse, KeyError, "undocumented"),
        (hang, TooSlow, "took more than"),
        (take_memory, TooLarge, "bytes for"),
    ],
)
def test_what_is_wrong_is_found(
    parse: Callable[[bytes], None], error: type[BaseException], shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "EXAMPLE_DEADLINE_S", 1.0)
    with pytest.raises(error, match=shown):
        fuzz(OneInput("fake", parse, (b"!",), (ValueError,)), 20.0)


def test_what_is_right_is_run_until_its_time_is_over() -> None:
    assert fuzz(OneInput("fake", lambda _: None), 0.2) >= 200
