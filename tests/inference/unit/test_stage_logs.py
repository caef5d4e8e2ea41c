"""Stage processes log as services do: one line an event, with the instance and rank, whatever a peer says."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator

import pytest

from shoal_common.logs import StructuredLogger
from shoal_inference.stage import logs
from shoal_inference.stage.errors import LinkClosed
from shoal_inference.stage.ring import connection
from shoal_inference.stage.ring.connection import Connection, RingAddress
from shoal_inference.stage.ring.handshake import RingPlace
from shoal_inference.stage.ring.ring import Successor

PREFIX = r"ts=\S+ level=\w+ service=stage node=b "


@pytest.fixture(autouse=True)
def _root_logger_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_I10_no_peer_can_forge_a_stages_log_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure("b", instance="i1", rank=1)
    StructuredLogger("stage.ring").warning("connection rejected", reason="bad\nts=0 level=info msg=forged")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.fullmatch(
        PREFIX + r'msg="connection rejected" instance=i1 rank=1 reason="bad\\nts=0 level=info msg=forged"', lines[0]
    )


async def test_an_unreachable_next_stage_is_logged_once_by_its_node(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logs.configure("b", instance="i1", rank=1)
    place = RingPlace(instance="i1", epoch=1, rank=1, stages=3, successor_secret=b"s", predecessor_secret=b"p")
    successor = Successor(place, b"ring", 1.0, lambda: None, lambda error: None, "c")
    attempted = asyncio.Event()

    async def refuse(*_: object) -> Connection:
        attempted.set()
        raise LinkClosed("nobody listens")

    monkeypatch.setattr(connection, "connect", refuse)
    running = asyncio.create_task(successor.run())
    for _ in range(4):
        attempted.clear()
        successor.target(RingAddress("127.0.0.1", 9))  # cuts the back-off short: another attempt
        await attempted.wait()
    running.cancel()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.match(PREFIX + r'msg="next stage is unreachable" instance=i1 rank=1 peer_rank=2 peer_node=c ', lines[0])
