"""Run a gateway as a real process."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from shoal_common.identity.api_key import read_api_key
from tests.harness.forked import ForkedService
from tests.harness.nats import NatsServer
from tests.harness.process import node_environment, start_service

NODE = "here"
START_DEADLINE_S = 45.0

_LIMITS = """[gateway]
gap_s = 0.3
silence_s = 1.0
first_token_s = 1.5
accept_s = 3
fetch_begins_s = 2
keep_alive_s = 0.2
place_s = 5
"""
_READY = re.compile(r"msg=ready .*addresses=(\S+)")


class RunningGateway(msgspec.Struct, frozen=True):
    """A gateway process."""

    url: str
    nats: NatsServer
    log: Path
    process: subprocess.Popen[bytes] | ForkedService

    @property
    def key(self) -> dict[str, str]:
        """The header with its key: not every system says whose a connection is."""
        return {"Authorization": f"Bearer {read_api_key(self.log.parent)}"}


@contextmanager
def running_gateway(
    home: Path,
    nats: NatsServer,
    node: str = NODE,
    within: tuple[str, ...] = (),
    settings: str = "",
    **environment: str,
) -> Iterator[RunningGateway]:
    """Run a gateway on a free port while the body runs.

    `within` is a command that runs it by exec; `settings` are more lines of `[gateway]`.
    """
    home.mkdir(exist_ok=True)
    (home / "node.toml").write_text(f'id = "{node}"\n{_LIMITS}{settings}\n')
    log = home / "gateway.log"
    with log.open("wb") as output:
        environment = {**node_environment(home, nats.url), "SHOAL_GATEWAY_PORT": "0", **environment}
        process = start_service("gateway", environment, output, within)
    try:
        address = _address(process, log)
        yield RunningGateway(f"http://127.0.0.1:{address.rpartition(':')[2]}", nats, log, process)
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes] | ForkedService, log: Path) -> str:
    give_up_s = time.monotonic() + START_DEADLINE_S
    while True:
        ready = _READY.search(log.read_text())
        if ready:
            return ready.group(1).split(",")[0]
        if process.poll() is not None or time.monotonic() > give_up_s:
            raise AssertionError(f"the gateway did not start:\n{log.read_text()}")
        time.sleep(0.02)
