"""A real nats-server, its store in the test's directory, that can be stopped, killed, restarted and wiped."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Self

import msgspec

from shoal_common.bus.connection import Nats, connected, login_of
from shoal_common.bus.kv_bucket import Buckets
from shoal_common.bus.streams import MARK_KEY, ensure_streams
from shoal_common.identity.node_identity import CLI
from tests.harness.identities import Authority
from tests.harness.ports import ReservedPort
from tests.harness.process import is_at_work

START_DEADLINE_S = 45.0
STOP_DEADLINE_S = 30.0
_POLL_S = 0.01

_SETTINGS = """
listen: "{host}:{port}"
ports_file_dir: "{directory}"
jetstream {{
  store_dir: "{directory}/store"
  sync_interval: always
  max_file_store: 1GB
  max_memory_store: 64MB
}}
"""
_TLS = """
tls {{
  cert_file: "{operator.certificate_file}"
  key_file: "{operator.key_file}"
  handshake_first: true
}}
"""


class _Ports(msgspec.Struct):
    nats: list[str]


class NatsServer:
    """A nats-server with JetStream that syncs every acknowledged write to disk. Starts on entering the context.

    `within` is a command that runs it by exec, such as `ip netns exec`; it needs a given port. With an authority it
    speaks TLS, for the members of its cluster. `settings` are more lines of its configuration.
    """

    def __init__(
        self,
        directory: Path,
        host: str = "127.0.0.1",
        port: int = 0,
        within: tuple[str, ...] = (),
        settings: str = "",
        authority: Authority | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.operator = authority.operator(directory) if authority else None
        """Whose certificate it has, and as whom a test logs in."""
        if self.operator:
            settings += _TLS.format(operator=self.operator)
        self.url = ""
        self._reserved = None if port else ReservedPort(host)
        self._host, self._within, self._settings = host, within, settings
        self._port = self._reserved.number if self._reserved else port
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def start(self) -> None:
        """Start it, every time on the same port. Blocks until it listens (~50 ms)."""
        assert self._process is None, "the server is running already"
        settings = self.directory / "nats-server.conf"
        text = _SETTINGS.format(host=self._host, port=self._port, directory=self.directory)
        settings.write_text(text + self._settings)
        with (self.directory / "nats-server.log").open("ab") as output:
            self._process = subprocess.Popen(
                [*self._within, str(Path(sys.executable).with_name("nats-server")), "-c", str(settings)],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        ports = self.directory / f"nats-server_{self._process.pid}.ports"
        give_up_s = time.monotonic() + START_DEADLINE_S
        while True:
            if self._process.poll() is not None or time.monotonic() > give_up_s:
                raise AssertionError(f"nats-server did not start:\n{self.log()}")
            try:
                self.url = msgspec.json.decode(ports.read_bytes(), type=_Ports).nats[0]
                break
            except (FileNotFoundError, msgspec.MsgspecError):
                time.sleep(_POLL_S)

    def stop(self) -> None:
        """Stop it, and wait."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it (SIGKILL); does nothing if it has ended already."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Start it again on the same port and store, after killing it if it runs."""
        self.kill()
        self.start()

    def restore(self) -> bool:
        """Start it again if a test has left it dead or paused. Returns whether it was."""
        if self._process is not None and is_at_work(self._process):
            return False
        self.restart()
        return True

    def wipe(self) -> None:
        """Kill it, delete its store, and start it on the same port."""
        self.kill()
        shutil.rmtree(self.directory / "store", ignore_errors=True)
        self.start()

    def log(self) -> str:
        """Return its output so far."""
        return (self.directory / "nats-server.log").read_text(errors="replace")

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(number)
        self._process.wait(STOP_DEADLINE_S)
        self._process = None


class Joined:
    """A test's own connection to the cluster."""

    def __init__(self, nats: Nats) -> None:
        self.nats, self.client, self.js = nats, nats.client, nats.js
        self.buckets = Buckets(nats.js)

    async def last_sequence(self, stream: str) -> int:
        """Return the sequence of a stream's last message: unchanged means that nothing was written."""
        return int((await self.js.stream_info(stream)).state.last_seq)

    async def key_count(self, bucket: str) -> int:
        """Return the number of messages in a bucket, markers of deletions included, its own mark not."""
        mark = f"$KV.{bucket}.{MARK_KEY}"
        state = (await self.js.stream_info(f"KV_{bucket}", subjects_filter=mark)).state
        return int(state.messages) - len(state.subjects or {})


@asynccontextmanager
async def joined(server: NatsServer) -> AsyncIterator[Joined]:
    """Connect as a service does, after creating streams and buckets."""
    login = login_of(server.operator, CLI) if server.operator else None
    async with connected([server.url], "test", START_DEADLINE_S, login) as nats:
        await ensure_streams(nats.js)
        yield Joined(nats)
