"""What the tests of `shoal doctor` share: an environment, findings, liveness records, a port."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from shoal_cli.doctor.finding import Finding
from shoal_cli.doctor.run import DoctorReport, run_checks
from shoal_cli.node_home import Home
from shoal_common import VERSION
from shoal_common.bus.keys import liveness_key
from shoal_common.messages.liveness import LivenessRecord, ProcessIdentity
from tests.harness.nats import Joined, NatsServer, joined
from tests.harness.ports import ReservedPort
from tests.harness.process import source_path

RUN_DEADLINE_S = 90.0


@cache
def _gateway_port() -> ReservedPort:
    return ReservedPort()


def clean_environment(**more: str) -> dict[str, str]:
    """An environment in which no port of this machine's own Shoal matters."""
    return {"SHOAL_GATEWAY_PORT": str(_gateway_port().number), "PATH": os.environ.get("PATH", ""), **more}


def probe(home: Home, server: NatsServer | str, **more: str) -> DoctorReport:
    url = server if isinstance(server, str) else server.url
    return run_checks(home, clean_environment(SHOAL_NATS=url, **more))


def findings_about(report: DoctorReport, check: str) -> list[Finding]:
    return [f for f in report.findings if f.check == check]


def only_finding(report: DoctorReport, check: str) -> Finding:
    [one] = findings_about(report, check)
    return one


def cluster(server: NatsServer, work: Callable[[Joined], Awaitable[None]]) -> None:
    """Do something to the cluster as its nodes would."""

    async def run() -> None:
        async with joined(server) as here:
            await work(here)

    asyncio.run(run())


def put_liveness(server: NatsServer, *entries: tuple[str, str, LivenessRecord]) -> None:
    """Write liveness values, as services of nodes elsewhere do."""

    async def write(here: Joined) -> None:
        for node, service, live in entries:
            await here.buckets.live.put(liveness_key(node, service), live)

    cluster(server, write)


def liveness_elsewhere(host: str = "other/boot/1", **more: Any) -> LivenessRecord:
    """What a service on another machine says."""
    who = ProcessIdentity(uid="u1", host=host, pid=4711, network_namespace="another")
    return LivenessRecord(**{"holder": who, "version": VERSION, "started_at_s": time.time() - 100, **more})


@contextmanager
def listening(answer: bytes | None = None) -> Iterator[int]:
    """A program that has a port, and says this to whoever comes; nothing, if None."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    taken.append(server.accept()[0])
                except OSError:
                    return
                if answer is not None:
                    taken[-1].sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield int(server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
        thread.join(RUN_DEADLINE_S)
        for connection in taken:
            connection.close()


# Nodes that run


def run_doctor(root: Path, *more: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shoal_cli", "doctor", "--home", str(root), *more],
        env={**clean_environment(**environ), "PYTHONPATH": source_path()},
        capture_output=True,
        text=True,
        timeout=RUN_DEADLINE_S,
        check=False,
    )
