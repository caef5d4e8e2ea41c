"""Which bytes a Range header means, compared with a slow and simple model."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import shoal_fileserver.http.ranges
from shoal_fileserver.http.ranges import AllBytes, ByteRange, Unsatisfiable, parse_range

SIZES = st.integers(0, 40)
NUMBERS = st.integers(0, 50)


@given(SIZES, NUMBERS, NUMBERS)
def test_first_and_last_mean_the_bytes_between_them_that_exist(size: int, first: int, last: int) -> None:
    meant = [at for at in range(size) if first <= at <= last]
    found = parse_range(f"bytes={first}-{last}", size)
    if last < first:
        assert found == AllBytes(), "not a range at all"
    elif meant:
        assert found == ByteRange(meant[0], meant[-1] + 1)
    else:
        assert found == Unsatisfiable()


@given(SIZES, NUMBERS)
def test_an_open_end_means_all_from_there(size: int, first: int) -> None:
    found = parse_range(f"bytes={first}-", size)
    assert found == (ByteRange(first, size) if first < size else Unsatisfiable())


@given(SIZES, NUMBERS)
def test_a_suffix_means_that_many_last_bytes(size: int, count: int) -> None:
    meant = list(range(size))[-count:] if count else []
    found = parse_range(f"bytes=-{count}", size)
    assert found == (ByteRange(meant[0], size) if meant else Unsatisfiable())


@given(st.text(max_size=120) | st.from_regex(r"bytes=[-0-9, ]*", fullmatch=True), st.integers(0, 10**13))
@example("bytes=٣-٤", 10)
@example("bytes=" + "9" * 40 + "-", 10)
def test_I10_any_range_header_stays_within_the_file(header: str, size: int) -> None:
    found = parse_range(header, size)
    if isinstance(found, ByteRange):
        assert 0 <= found.start < found.end <= size
        assert header.strip().isascii()


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "bytes",
        "bytes=",
        "bytes=-",
        "bytes=a-b",
        "bytes=1-2,4-5",
        "items=0-1",
        "bytes=0-1" + " " * 200,
        "bytes=-1-2",
    ],
)
def test_what_is_no_single_range_means_everything(header: str | None) -> None:
    assert parse_range(header, 100) == AllBytes()


def test_reading_a_range_imports_neither_disk_nor_network() -> None:
    tree = ast.parse(Path(shoal_fileserver.http.ranges.__file__).read_text())
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imported == {"__future__", "re", "msgspec"}
