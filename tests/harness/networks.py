"""Machines with networks of their own for tests: Linux network namespaces, connected by wires (veth pairs).

A namespace has its own loopback, and only the wires that a test adds. NATS and the hub, which every node needs,
listen on loopback of the test's own namespace; `relayed` opens a port on a machine's loopback that leads there, so
that a machine needs only the interfaces that the test is about.
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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

_CLONE_NEWNET = 0x40000000
_CHUNK_BYTES = 1 << 18
_DEADLINE_S = 20.0


class Machine:
    """A network namespace. The test names its interfaces."""

    def __init__(self, name: str) -> None:
        self.namespace = f"shoal-{name}-{uuid.uuid4().hex[:6]}"

    @property
    def within(self) -> tuple[str, ...]:
        """Return a command's prefix that runs it here."""
        return ("ip", "netns", "exec", self.namespace)

    def ip(self, *arguments: str) -> None:
        """Run `ip` in this namespace."""
        _ip("-n", self.namespace, *arguments)

    def listener(self, port: int) -> socket.socket:
        """Return a socket of this process that listens on the machine's loopback."""
        return self._made_in_namespace(lambda: socket.create_server(("127.0.0.1", port)))

    def connection(self, host: str, port: int) -> socket.socket:
        """Return a socket of this process, connected from the machine. Raises OSError."""
        return self._made_in_namespace(lambda: socket.create_connection((host, port), _DEADLINE_S))

    def _made_in_namespace(self, make: Callable[[], socket.socket]) -> socket.socket:
        made: list[socket.socket | OSError] = []

        def enter() -> None:
            # A socket stays in the namespace of the thread that created it; the thread itself ends.
            at = os.open(f"/run/netns/{self.namespace}", os.O_RDONLY)
            try:
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(at, _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
                made.append(make())
            except OSError as e:
                made.append(e)
            finally:
                os.close(at)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        (found,) = made
        if isinstance(found, OSError):
            raise found
        return found


def no_networks() -> str:
    """Return why networks cannot be created on this machine; "" if they can."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        return "only root on Linux with iproute2 can make networks"
    tried = f"shoal-try-{uuid.uuid4().hex[:6]}"
    done = subprocess.run(["ip", "netns", "add", tried], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"no network namespace can be made: {done.stderr.strip()}"
    _ip("netns", "del", tried)
    return ""


@contextmanager
def machines(*names: str) -> Iterator[list[Machine]]:
    """Create machines with only loopback, while the body runs. Skips where that is not possible."""
    if reason := no_networks():
        pytest.skip(f"{reason}: nodes with several networks are NOT tested here")
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
    """Add a wire: an interface of this name on both machines, with these addresses (`host/prefix`)."""
    one.ip("link", "add", name, "type", "veth", "peer", "name", name, "netns", other.namespace)
    for machine, given in ((one, addresses), (other, others)):
        machine.ip("link", "set", name, "up")
        for address in given:
            machine.ip("address", "add", address, "dev", name, *(["nodad"] if ":" in address else []))


class Switch:
    """Machines on one network, each on a wire of its own to a bridge. Wires can be pulled, and packets lost."""

    def __init__(self, bridge: Machine, others: Mapping[str, Machine]) -> None:
        self._bridge, self._others = bridge, dict(others)
        self.addresses = {name: f"{_NETWORK}.{number}" for number, name in enumerate(others, 1)}
        bridge.ip("link", "add", "bridge", "type", "bridge")
        bridge.ip("link", "set", "bridge", "up")
        for name, machine in others.items():
            peer = ("peer", "name", _WIRE, "netns", machine.namespace)
            bridge.ip("link", "add", self._plug(name), "type", "veth", *peer)
            bridge.ip("link", "set", self._plug(name), "master", "bridge", "up")
            machine.ip("link", "set", _WIRE, "up")
            machine.ip("address", "add", f"{self.addresses[name]}/24", "dev", _WIRE)

    def _plug(self, name: str) -> str:
        return f"to-{name}"

    def unplug(self, name: str) -> None:
        """Pull a machine's wire: it reaches nobody, and sees that its link is down."""
        self._bridge.ip("link", "set", self._plug(name), "down")

    def plug_in(self, name: str) -> None:
        """Plug the wire in again."""
        self._bridge.ip("link", "set", self._plug(name), "up")

    def drop(self, one: str, other: str) -> None:
        """Drop what one machine sends to the other, silently."""
        to_nobody = ("lladdr", _NOBODY, "dev", _WIRE, "nud", "permanent")
        self._others[one].ip("neigh", "replace", self.addresses[other], *to_nobody)

    def deliver(self, one: str, other: str) -> None:
        """Deliver it again."""
        self._others[one].ip("neigh", "del", self.addresses[other], "dev", _WIRE)


_NETWORK, _WIRE, _NOBODY = "10.213.77", "wire", "02:00:00:00:00:99"


@contextmanager
def relayed(machine: Machine, port: int, delay_s: float = 0.0) -> Iterator[None]:
    """While the body runs, relay this port of the machine's loopback to the same port of ours, with this delay."""
    with _relaying(
        machine.listener(port), lambda: socket.create_connection(("127.0.0.1", port), _DEADLINE_S), delay_s
    ):
        yield


@contextmanager
def port_forward(machine: Machine, host: str, port: int, at: int = 0, delay_s: float = 0.0) -> Iterator[int]:
    """While the body runs, relay a port of our loopback (`at`, or any) to this host and port as seen from the
    machine, with this delay."""
    listener = socket.create_server(("127.0.0.1", at))
    with _relaying(listener, lambda: machine.connection(host, port), delay_s):
        yield int(listener.getsockname()[1])


@contextmanager
def _relaying(listener: socket.socket, connect: Callable[[], socket.socket], delay_s: float = 0.0) -> Iterator[None]:
    running: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
    # In a thread: tests wait for processes to end without running their own loop, and those still talk to NATS.
    thread = threading.Thread(target=lambda: asyncio.run(_relay(listener, connect, running, delay_s)))
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
    listener: socket.socket,
    connect: Callable[[], socket.socket],
    running: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]],
    delay_s: float,
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.CancelledError):
            connection = await asyncio.to_thread(connect)
            connection.setblocking(False)
            there, back = await asyncio.open_connection(sock=connection)
            try:
                await asyncio.gather(_copy(reader, back, delay_s), _copy(there, writer, delay_s))
            finally:
                back.close()
        writer.close()

    ending = asyncio.Event()
    server = await asyncio.start_server(serve, sock=listener)
    running.set_result((asyncio.get_running_loop(), ending))
    await ending.wait()
    server.close()  # open connections end with this loop


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
    while chunk := await reader.read(_CHUNK_BYTES):
        if delay_s:
            await asyncio.sleep(delay_s)  # the delay of a long wire
        writer.write(chunk)
        await writer.drain()
    with suppress(OSError):
        writer.write_eof()


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr.strip()}"
