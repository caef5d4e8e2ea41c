"""The gateway that tests share is started again after a test that failed while it had killed or paused it."""

from __future__ import annotations

import signal

import httpx2
import pytest

from tests.gateway.conftest import SharedGateway
from tests.harness.process import is_at_work
from tests.harness.shoal import eventually


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, None], ids=["killed", "paused", "without NATS"])
def test_a_gateway_left_broken_by_a_test_serves_the_next(
    shared_gateway: SharedGateway, number: signal.Signals | None
) -> None:
    gateway = shared_gateway.running()
    if number is None:
        gateway.nats.kill()
    else:
        gateway.process.send_signal(number)
        eventually(lambda: not is_at_work(gateway.process), "the signal has arrived")
    answer = httpx2.get(f"{shared_gateway.running().url}/v1/status", timeout=15, headers=shared_gateway.running().key)
    assert answer.is_success, answer.text
