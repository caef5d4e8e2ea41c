"""Runs parsers on inputs that Hypothesis makes of their corpus, guided by the lines that they reach.

Each example has a deadline, and the process must not grow. An input that reaches a new line joins the pool from which
the next inputs are made; SHOAL_FUZZ_KEEP=1 adds it to the corpus.
"""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import psutil
from hypothesis import HealthCheck, Phase, given, seed, settings, target
from hypothesis import strategies as st

from tests.fuzz.parser_under_test import Parser

EXAMPLE_DEADLINE_S = 2.0
"""Of one input, of computing: the machine may do other things too."""
MAX_GROWTH_BYTES = 64 << 20
"""Of the process, over all inputs of one parser."""
MAX_EXAMPLE_BYTES = 32 << 20
"""More memory than this for one input of at most MAX_INPUT_BYTES is an attack."""
MAX_INPUT_BYTES = 64 << 10
MAX_KEPT_BYTES = 512
MAX_KEPT = 32
"""Inputs that are kept of one parser."""
_ROUND_EXAMPLES = 200
_MAX_POOL = 300
_PACKAGES = ("shoal_",)
_KIB = 1024

Line = tuple[CodeType, int]


class TooSlow(BaseException):
    """An input took longer than its deadline. No handler of the parser catches it."""


class TooLarge(BaseException):
    """An input took more memory than MAX_EXAMPLE_BYTES. It shows once: what a process has had, it keeps."""


def fuzz(parser: Parser, budget_s: float, first_seed: int = 0) -> int:
    """Run a parser for so many seconds. Returns the number of inputs; raises what one of them has shown."""
    pool, ends_s, count = parser.corpus(), time.monotonic() + budget_s, 0
    reached: set[Line] = set()
    for data in pool:
        reached |= _examine(parser, data)
    rss_bytes = psutil.Process().memory_info().rss
    number = first_seed
    while time.monotonic() < ends_s:
        found = _round(parser, pool, reached, number, ends_s)
        count, number = count + _ROUND_EXAMPLES, number + 1
        for data in found:
            if len(pool) < _MAX_POOL:
                pool.append(data)
            _keep(parser, data)
        growth_bytes = psutil.Process().memory_info().rss - rss_bytes
        assert growth_bytes < MAX_GROWTH_BYTES, f"{parser.name} grows: {growth_bytes} bytes after {count} inputs"
    return count


def _round(parser: Parser, pool: list[bytes], reached: set[Line], number: int, ends_s: float) -> list[bytes]:
    found: list[bytes] = []

    @seed(number)
    @settings(
        max_examples=_ROUND_EXAMPLES,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.target, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs(tuple(pool), parser.pieces))
    def examine(data: bytes) -> None:
        if time.monotonic() > ends_s + EXAMPLE_DEADLINE_S:
            return
        lines = _examine(parser, data)
        if new := lines - reached:
            reached.update(new)
            found.append(data)
        target(float(len(lines)))

    examine()
    return found


def replay(parser: Parser) -> int:
    """Run a parser on its corpus. Returns the number of inputs."""
    corpus = parser.corpus()
    for data in corpus:
        with deadline(parser, data):
            parser.run(data)
    return len(corpus)


def _examine(parser: Parser, data: bytes) -> set[Line]:
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with deadline(parser, data), tracing() as lines:
        parser.run(data)
    grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before) * _KIB
    if grown_bytes > MAX_EXAMPLE_BYTES:
        raise TooLarge(f"{parser.name} takes {grown_bytes} bytes for {data[:200]!r}")
    return lines


@contextmanager
def deadline(parser: Parser, data: bytes) -> Iterator[None]:
    """Raise TooSlow in the body after EXAMPLE_DEADLINE_S."""

    def expired(*_: object) -> None:
        raise TooSlow(f"{parser.name} took more than {EXAMPLE_DEADLINE_S} s for {data[:200]!r}")

    before = signal.signal(signal.SIGPROF, expired)
    signal.setitimer(signal.ITIMER_PROF, EXAMPLE_DEADLINE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def tracing() -> Iterator[set[Line]]:
    """Yield the lines of Shoal's code that the body reaches."""
    lines: set[Line] = set()

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            lines.add((frame.f_code, frame.f_lineno))
        return local

    def trace(frame: FrameType, _: str, __: Any) -> Any:
        return local if any(name in frame.f_code.co_filename for name in _PACKAGES) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(before)


@st.composite
def inputs(draw: st.DrawFn, pool: tuple[bytes, ...], pieces: tuple[bytes, ...]) -> bytes:
    """Return an input: one of the pool with some changes, or a few pieces and bytes."""
    if not pool or draw(st.integers(0, 9)) == 0:
        piece = st.binary(max_size=12) | (st.sampled_from(pieces) if pieces else st.nothing())
        return b"".join(draw(st.lists(piece, max_size=12)))[:MAX_INPUT_BYTES]
    data = bytearray(draw(st.sampled_from(pool)))
    for _ in range(draw(st.integers(0, 5))):
        _change(draw, data, pool, pieces)
    return bytes(data[:MAX_INPUT_BYTES])


def _change(draw: st.DrawFn, data: bytearray, pool: tuple[bytes, ...], pieces: tuple[bytes, ...]) -> None:
    at = draw(st.integers(0, len(data)))
    end = min(len(data), at + draw(st.integers(0, 8)))
    match draw(st.integers(0, 6)):
        case 0:
            data[at:at] = draw(st.binary(min_size=1, max_size=4))
        case 1:
            del data[at:end]
        case 2:
            data[at:end] = draw(st.binary(min_size=end - at, max_size=end - at))
        case 3:
            data[at:at] = data[at:end] * draw(st.sampled_from([1, 2, 50, 2000]))
        case 4 if pieces:
            data[at:end] = draw(st.sampled_from(pieces))
        case 5:
            other = draw(st.sampled_from(pool))
            data[at:] = other[draw(st.integers(0, len(other))) :]
        case _:
            del data[at:]


def _keep(parser: Parser, data: bytes) -> None:
    if not os.environ.get("SHOAL_FUZZ_KEEP") or len(data) > MAX_KEPT_BYTES:
        return
    if len(list(parser.directory.iterdir())) < MAX_KEPT:
        (parser.directory / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)
