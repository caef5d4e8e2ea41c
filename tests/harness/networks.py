"""Machines for tests that have their own networks: Linux's network namespaces, with wires (veth pairs) between them.

A namespace has its own loopback, and only the wires that a test lays. What every node needs besides, NATS and the
hub, listens on loopback of the test's own namespace; `relayed` opens a port on a machine's loopback that leads there,
so that a machine needs no interface but those the test is about.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

_CLONE_NEWNET = 0x40000000
_CHUNK_BYTES = 1 << 18
_DEADLINE_S = 20.0


class Machine:
    """A network namespace. Interfaces have the names that the test gives them."""

    def __init__(self, name: str) -> None:
        self.namespace = f"shoal-{name}-{uuid.uuid4().hex[:6]}"

    @property
    def within(self) -> tuple[str, ...]:
        """What runs a command here."""
        return ("ip", "netns", "exec", self.namespace)

    def ip(self, *arguments: str) -> None:
        """`ip` in this namespace."""
        _ip("-n", self.namespace, *arguments)

    def listener(self, port: int) -> socket.socket:
        """A socket that listens on this machine's loopback, for this process to accept from."""
        made: list[socket.socket | OSError] = []

        def listen() -> None:
            # A socket stays in the namespace of the thread that made it; the thread ends, and with it its membership.
            at = os.open(f"/run/netns/{self.namespace}", os.O_RDONLY)
            try:
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(at, _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
                made.append(socket.create_server(("127.0.0.1", port)))
            except OSError as e:
                made.append(e)
            finally:
                os.close(at)

        thread = threading.Thread(target=listen)
        thread.start()
        thread.join()
        (found,) = made
        if isinstance(found, OSError):
            raise found
        return found


@contextmanager
def machines(*names: str) -> Iterator[list[Machine]]:
    """Machines with nothing but loopback, while the body runs. Skips where there can be none."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("only root on Linux with iproute2 can make networks: nodes with several are NOT tested here")
    if not Path("/proc/net/if_inet6").exists():
        pytest.skip("this kernel has no IPv6: nodes with several networks are NOT tested here")
    made = [Machine(name) for name in names]
    try:
        try:
            for machine in made:
                _ip("netns", "add", machine.namespace)
                machine.ip("link", "set", "lo", "up")
        except AssertionError as e:
            pytest.skip(f"no network namespace can be made, nodes with several networks are NOT tested here: {e}")
        yield made
    finally:
        for machine in made:
            with suppress(AssertionError):
                _ip("netns", "del", machine.namespace)


def wire(name: str, one: Machine, addresses: tuple[str, ...], other: Machine, others: tuple[str, ...]) -> None:
    """Lay a wire: an interface of this name on both machines, with these addresses (`host/prefix`)."""
    one.ip("link", "add", name, "type", "veth", "peer", "name", name, "netns", other.namespace)
    for machine, given in ((one, addresses), (other, others)):
        machine.ip("link", "set", name, "up")
        for address in given:
            machine.ip("address", "add", address, "dev", name, *(["nodad"] if ":" in address else []))


@contextmanager
def relayed(machine: Machine, port: int) -> Iterator[None]:
    """While the body runs, this port on the machine's loopback leads to the same port on ours."""
    running: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
    # A thread: tests wait for processes to end without letting their own loop run, and those say goodbye to NATS.
    thread = threading.Thread(target=lambda: asyncio.run(_relay(machine, port, running)))
    thread.start()
    try:
        loop, ending = running.result(_DEADLINE_S)
        try:
            yield
        finally:
            loop.call_soon_threadsafe(ending.set)
    finally:
        thread.join()


async def _relay(
    machine: Machine, port: int, running: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.CancelledError):
            there, back = await asyncio.open_connection("127.0.0.1", port)
            try:
                await asyncio.gather(_copy(reader, back), _copy(there, writer))
            finally:
                back.close()
        writer.close()

    ending = asyncio.Event()
    try:
        server = await asyncio.start_server(serve, sock=machine.listener(port))
    except OSError as e:
        running.set_exception(e)
        return
    running.set_result((asyncio.get_running_loop(), ending))
    await ending.wait()
    server.close()  # connections under way end with this loop


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(_CHUNK_BYTES):
        writer.write(chunk)
        await writer.drain()
    with suppress(OSError):
        writer.write_eof()


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr.strip()}"
