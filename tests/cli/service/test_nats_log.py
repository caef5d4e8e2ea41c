"""nats-server's log lines in Shoal's format."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_cli.node.children.nats_process import find_program
from shoal_cli.node.logs.log_reader import written_at_s
from shoal_cli.node.logs.log_rotation import RotatingLog, pump, tail
from shoal_cli.node.logs.nats_format import NatsLog, message_of, translate
from shoal_common.logs import FLOOD_BURST, FLOOD_INTERVAL_S

_SHOAL_LINE = re.compile(
    r"ts=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z level=(\w+) service=nats node=a msg=(\S+|\"(?:[^\"\\]|\\.)*\")"
)


def translated(line: bytes) -> str:
    return translate(line, "a", 0.0).decode()


@pytest.fixture
def local_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A zone two hours ahead of UTC: nats-server writes local time."""
    monkeypatch.setenv("TZ", "UTC-2")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("local_time")
def test_a_line_gets_the_time_in_utc_the_level_and_the_node() -> None:
    assert translated(b"[7] 2026/01/31 12:30:05.123456 [INF] Server is ready\n") == (
        'ts=2026-01-31T10:30:05.123Z level=info service=nats node=a msg="Server is ready"\n'
    )
    for mark, level in ((b"DBG", "debug"), (b"TRC", "debug"), (b"WRN", "warning"), (b"ERR", "error")):
        assert f" level={level} " in translated(b"[7] 2026/01/31 12:30:05.123456 [" + mark + b"] x\n")
    assert " level=critical " in translated(b"[7] 2026/01/31 12:30:05.123456 [FTL] x\n")


def test_a_line_without_nats_servers_format_is_an_error_of_now() -> None:
    assert translated(b"nats-server: open /x: no such file\n") == (
        'ts=1970-01-01T00:00:00.000Z level=error service=nats node=a msg="nats-server: open /x: no such file"\n'
    )
    assert "level=error" in translated(b"[7] 2026/99/31 12:30:05.123456 [INF] x\n")


@given(st.binary(max_size=200).map(lambda b: b.replace(b"\n", b"")))
def test_whatever_a_line_holds_stays_one_line_of_our_format(text: bytes) -> None:
    for line in (text + b"\n", b"[7] 2026/01/31 12:30:05.123456 [INF] " + text + b"\n"):
        shown = translated(line)
        assert shown.endswith("\n") and shown[:-1].isprintable()
        assert _SHOAL_LINE.fullmatch(shown[:-1]), shown


def test_I7_what_clients_cause_cannot_flood_the_log() -> None:
    log, shown = NatsLog("a"), []
    for n in range(10_000):
        mark = f"[7] 2026/01/31 12:30:05.123456 [ERR] 10.0.0.{n % 250}:{n} - cid:{n} - ".encode()
        for text in (b"authentication error\n", b'Client parser ERROR, state=0, i=0: proto="%d"...\n' % n):
            shown.append(log.translate(mark + text, n / 1000))
    shown = [line for line in shown if line]
    assert 2 * FLOOD_BURST <= len(shown) <= 2 * (FLOOD_BURST + 10 / FLOOD_INTERVAL_S)
    counts = [int(line.rpartition(b" left_out=")[2]) for line in shown if b" left_out=" in line]
    assert counts and sum(counts) < 20_000
    line = b"[7] 2026/01/31 12:30:05.123456 [INF] Server is ready\n"
    assert all(log.translate(line, 10.0) == translate(line, "a", 10.0) for _ in range(2 * FLOOD_BURST))


def run_server(config: Path, log: RotatingLog) -> list[bytes]:
    """Run a server until it is ready, its output translated into a log as the supervisor does. Returns the output."""
    reading, writing = os.pipe()
    process = subprocess.Popen([str(find_program()), "-c", str(config)], stdout=writing, stderr=writing)
    os.close(writing)
    lines: list[bytes] = []

    def keep(line: bytes) -> bytes:
        lines.append(line)
        if b"Server is ready" in line:
            process.send_signal(signal.SIGTERM)
        return translate(line, "a", time.time())

    pump(reading, log, keep).join(45)
    assert process.wait(45) == 0
    return lines


def test_every_line_of_a_real_server_is_translated(tmp_path: Path) -> None:
    config = tmp_path / "c.conf"
    config.write_text(f'listen: "127.0.0.1:-1"\njetstream {{ store_dir: "{tmp_path / "js"}" }}\n')
    log, began_s = RotatingLog(tmp_path / "nats.log"), time.time()
    written = run_server(config, log) + run_server(config, log)  # a restart: each process has a pipe of its own
    shown = tail(log.path, 10_000)
    assert len(shown) == len(written) > 40
    levels = [match[1] for line in shown if (match := _SHOAL_LINE.fullmatch(line))]
    assert len(levels) == len(shown) and set(levels) == {"info"}, shown
    assert [line.count("Server Exiting") for line in shown].count(1) == 2
    times_s = [written_at_s(line) for line in shown]
    assert all(s is not None and began_s - 60 < s <= time.time() for s in times_s)


def test_an_invalid_configuration_is_an_error_line(tmp_path: Path) -> None:
    (tmp_path / "c.conf").write_text("listen: [")
    done = subprocess.run(
        [str(find_program()), "-c", str(tmp_path / "c.conf")], capture_output=True, timeout=45, check=False
    )
    assert done.returncode == 1
    shown = translated(done.stderr)
    assert 'level=error service=nats node=a msg="nats-server: Parse error on line 1' in shown
    assert message_of(shown).startswith("nats-server: Parse error on line 1")
