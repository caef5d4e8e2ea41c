"""Logs that cannot fill a disk."""

import os
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal_cli.node.logs.log_reader import LogFollower, last_lines
from shoal_cli.node.logs.log_rotation import RotatingLog, pump, tail
from shoal_cli.node_home import Home

MAX_BYTES = 200


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=150).map(lambda b: b.replace(b"\n", b".") + b"\n"), max_size=80))
def test_I7_a_log_stays_bounded_and_keeps_the_newest_full_lines(lines: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "a.log"
        log = RotatingLog(path, MAX_BYTES, files=3)
        for line in lines:
            log.write(line)
        log.close()
        files = [p for p in (path.with_name("a.log.2"), path.with_name("a.log.1"), path) if p.exists()]
        assert len(list(Path(directory).iterdir())) == len(files) <= 3
        assert all(p.stat().st_size <= MAX_BYTES for p in files)
        kept = b"".join(p.read_bytes() for p in files).split(b"\n")[:-1]
        kept = [line + b"\n" for line in kept]
        assert kept == lines[len(lines) - len(kept) :]
        assert kept or not lines


def test_an_existing_log_keeps_growing_to_the_same_bound(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_bytes(b"x" * (MAX_BYTES - 1) + b"\n")
    log = RotatingLog(path, MAX_BYTES)
    log.write(b"next\n")
    assert path.read_bytes() == b"next\n"
    assert path.with_name("a.log.1").stat().st_size == MAX_BYTES


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is a Linux device")
def test_a_full_disk_drops_lines_and_does_not_block_the_writer() -> None:
    log = RotatingLog(Path("/dev/full"))
    log.write(b"lost\n")
    assert log.dropped_lines == 1


def test_a_pipe_is_written_out_until_its_last_writer_exits(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    log = RotatingLog(tmp_path / "a.log")
    thread = pump(reading, log)
    os.write(writing, b"one\ntwo\nno end of line")
    os.close(writing)
    thread.join(10)
    assert not thread.is_alive()
    assert tail(tmp_path / "a.log", 2) == ["two", "no end of line"]


def test_tail_of_a_long_log_starts_with_a_full_line(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_text("".join(f"line {i}\n" for i in range(1000)))
    found = tail(path, 1000, max_bytes=100)
    assert found[-1] == "line 999"
    assert all(text.startswith("line ") for text in found)
    assert tail(tmp_path / "none.log", 5) == []


def test_a_log_follower_misses_no_line_at_rotation(tmp_path: Path) -> None:
    log = RotatingLog(tmp_path / "a.log", MAX_BYTES)
    log.write(b"before\n")
    follower, found = LogFollower(tmp_path / "a.log"), []
    written = [f"line {i} {'x' * 60}" for i in range(12)]
    for i, text in enumerate(written):
        log.write(f"{text}\n".encode())
        if i % 2:
            found += follower.new_lines()
    assert found == written


def test_logs_of_several_services_are_merged_in_time_order(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.create()
    home.log("storage").write_text(
        "ts=2026-01-02T03:04:05.000Z level=info msg=first\n"
        "ts=2026-01-02T03:04:07.000Z level=info msg=third\n  a trace\n"
    )
    home.log("fetcher").write_text("ts=2026-01-02T03:04:06.000Z level=info msg=second\n")
    assert [text.split("msg=")[-1] for text in last_lines(home, "", 10)] == [
        "first",
        "second",
        "third",
        "storage    |   a trace",
    ]
