"""Logs: one line per event, whatever it contains, that can be parsed field by field."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shoal_common import logs
from shoal_common.logs import FLOOD_BURST, FLOOD_INTERVAL_S, FloodLimit, StructuredLogger, quote_value

PAIR = re.compile(r'([a-z_]+)=("(?:[^"\\]|\\.)*"|[^" =]*)(?: |$)')
ESCAPE = re.compile(r"\\(?:u\{([0-9a-f]+)\}|(.))")
HOSTILE = st.text(alphabet=st.characters(categories=None))


def unquoted(text: str) -> str:
    """Return what `quote_value` was given, by the documented format."""
    if not text.startswith('"'):
        return text
    plain = {"n": "\n", "r": "\r", "t": "\t"}
    return ESCAPE.sub(lambda m: chr(int(m[1], 16)) if m[1] else plain.get(m[2], m[2]), text[1:-1])


def parsed(line: str) -> dict[str, str]:
    found = {m[1]: unquoted(m[2]) for m in PAIR.finditer(line)}
    assert "".join(m[0] for m in PAIR.finditer(line)) == line, f"not all of the line is key=value: {line!r}"
    return found


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    out = io.StringIO()
    logs.configure_logging("storage", "node-a", "debug", out)
    yield out
    root.handlers[:] = handlers
    root.setLevel(level)


@given(HOSTILE)
@example("two\nlines")
@example("\x1b[2Jan escape sequence")
@example("next\x85line and\u2028separator")
@example("a\\nb")
@example('"')
@example("\ud800")
def test_I10_any_value_stays_on_one_line_and_reads_back(text: str) -> None:
    quoted = quote_value(text)
    assert len(f"{quoted}.".splitlines()) == 1
    assert all(c.isprintable() for c in quoted)
    quoted.encode()
    assert unquoted(quoted) == text


def test_a_log_line_has_who_when_and_what(stream: io.StringIO) -> None:
    StructuredLogger("test").warning(
        "a blob was set aside", blob="ab" * 4, why='hash is "wrong"\nhere', size_bytes=7, ratio=0.25
    )
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1
    fields = parsed(lines[0])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", fields.pop("ts"))
    assert fields == {
        "level": "warning",
        "service": "storage",
        "node": "node-a",
        "msg": "a blob was set aside",
        "blob": "abababab",
        "why": 'hash is "wrong"\nhere',
        "size_bytes": "7",
        "ratio": "0.25",
    }


def test_an_exception_with_its_trace_is_still_one_line(stream: io.StringIO) -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError as e:
        StructuredLogger("test").error("it failed", exc=e, verb="place")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1
    assert "ValueError: first\nsecond" in parsed(lines[0])["trace"]


def test_libraries_speak_from_warning_up_and_nats_is_left_to_us(stream: io.StringIO) -> None:
    logging.getLogger("some.library").info("chatter")
    logging.getLogger("nats.aio.client").error("refused, with a trace")
    assert stream.getvalue() == ""
    logging.getLogger("some.library").warning("trouble")
    assert parsed(stream.getvalue().rstrip("\n"))["msg"] == "trouble"


def test_I7_warnings_of_a_kind_cannot_flood_the_log(stream: io.StringIO) -> None:
    log, foreign = StructuredLogger("test"), logging.getLogger("asyncio")
    for n in range(20 * FLOOD_BURST):
        log.warning("connection refused", address=n)
        log.info("answer ended", request=n)
        foreign.error(f"socket.accept() out of system resource\nsocket: <fd={n}>")
    log.warning("something else")
    messages = [parsed(line)["msg"].partition("\n")[0] for line in stream.getvalue().splitlines()]
    assert messages.count("answer ended") == 20 * FLOOD_BURST and messages[-1] == "something else"
    for message in ("connection refused", "socket.accept() out of system resource"):
        assert FLOOD_BURST <= messages.count(message) <= 2 * FLOOD_BURST


TIMES = st.lists(st.floats(0, 600), min_size=150, max_size=400).map(sorted)


@given(TIMES)
def test_no_line_left_out_is_forgotten(times: list[float]) -> None:
    limit = FloodLimit()
    admitted = [limit.admit("kind", now_s) for now_s in times]
    shown = [count for count in admitted if count is not None]
    left_out = admitted.count(None)
    assert len(shown) <= FLOOD_BURST + (times[-1] - times[0]) / FLOOD_INTERVAL_S
    trailing = next((i for i, count in enumerate(reversed(admitted)) if count is not None), 0)
    assert sum(shown) == left_out - trailing


@given(TIMES)
def test_other_kinds_take_nothing_from_a_rare_one(times: list[float]) -> None:
    limit = FloodLimit()
    for number, now_s in enumerate(times):
        limit.admit(number, now_s)
        limit.admit("frequent", now_s)
    assert limit.admit("rare", times[-1]) == 0
