"""Nodes on separate links on one machine: network namespaces on a bridge, shaped by `tc tbf`. Linux, root.

Each node's traffic passes its own pair of devices: what it sends is shaped at its end, what it receives at the
bridge's. `Links.within(node)` starts a process on a node; the bridge itself, which outside processes reach, has the
address `Links.here`. What a killed run left behind is removed by the next one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

_PREFIX = "shb"
BURST_BYTES = 128 << 10
"""The kernel's own packets have 64 KiB at most: none is split, so that counters count few headers."""
QUEUE_S = 0.05
"""Maximum time that a byte waits in a link."""


class CannotMake(Exception):
    """Links cannot be created on this machine; the message says why."""


class Links:
    """Namespaces for `nodes`, while the context lasts. Raises CannotMake."""

    def __init__(self, nodes: list[str], bytes_per_s: float) -> None:
        self._pid, self._bytes_per_s = os.getpid(), bytes_per_s
        self.nodes = nodes
        # In 198.18.0.0/15, which is reserved for benchmarks.
        self._net = f"198.18.{self._pid % 254 + 1}"
        self.here = f"{self._net}.1"
        self._bridge = f"{_PREFIX}{self._pid}"

    def __enter__(self) -> Self:
        if sys.platform != "linux" or os.geteuid() != 0:
            raise CannotMake("only root on Linux can make network namespaces")
        if not (shutil.which("ip") and shutil.which("tc")):
            raise CannotMake("ip and tc are not here: install iproute2")
        _remove_leftovers()
        try:
            self._make()
        except subprocess.CalledProcessError as e:
            self._remove()
            raise CannotMake(f"`{' '.join(e.cmd)}` said: {e.stderr.strip()}") from None
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def address(self, node: str) -> str:
        """Return a node's address."""
        return f"{self._net}.{self.nodes.index(node) + 2}"

    def within(self, node: str) -> tuple[str, ...]:
        """Return the prefix of a command that runs on a node."""
        return ("ip", "netns", "exec", self._space(node))

    def shape(self, node: str, up: float, down: float) -> None:
        """Limit a node's link to this many bytes per second in each direction from now on."""
        for where, device, rate in (
            (("-n", self._space(node)), "eth0", up),
            ((), self._device(node), down),
        ):
            limit = int(rate * QUEUE_S) + BURST_BYTES
            shaped = ("tbf", "rate", f"{int(rate * 8)}bit", "burst", str(BURST_BYTES), "limit", str(limit))
            _run("tc", *where, "qdisc", "replace", "dev", device, "root", *shaped)

    def shape_all(self) -> None:
        """Set the same rate for all links, in each direction."""
        for node in self.nodes:
            self.shape(node, self._bytes_per_s, self._bytes_per_s)

    def sent_bytes(self, node: str) -> int:
        """Return the bytes that a node has sent so far, including headers."""
        # What its end sends, the bridge's end receives.
        return int(Path(f"/sys/class/net/{self._device(node)}/statistics/rx_bytes").read_text())

    def _space(self, node: str) -> str:
        return f"{self._bridge}-{node}"

    def _device(self, node: str) -> str:
        return f"{self._bridge}v{self.nodes.index(node)}"

    def _make(self) -> None:
        _run("ip", "link", "add", self._bridge, "type", "bridge")
        _run("ip", "address", "add", f"{self.here}/24", "dev", self._bridge)
        _run("ip", "link", "set", self._bridge, "up")
        for node in self.nodes:
            space, device = self._space(node), self._device(node)
            _run("ip", "netns", "add", space)
            _run("ip", "link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", space)
            _run("ip", "link", "set", device, "master", self._bridge, "up")
            _run("ip", "-n", space, "address", "add", f"{self.address(node)}/24", "dev", "eth0")
            _run("ip", "-n", space, "link", "set", "lo", "up")
            _run("ip", "-n", space, "link", "set", "eth0", "up")

    def _remove(self) -> None:
        _remove(self._bridge)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _remove(bridge: str) -> None:
    """Remove a run's bridge and namespaces; their devices go with them."""
    for line in _run("ip", "netns", "list").splitlines():
        if line.startswith(f"{bridge}-"):
            with suppress(subprocess.CalledProcessError):
                _run("ip", "netns", "delete", line.split()[0])
    with suppress(subprocess.CalledProcessError):
        _run("ip", "link", "delete", bridge)


def _remove_leftovers() -> None:
    for device in Path("/sys/class/net").glob(f"{_PREFIX}*"):
        pid = device.name.removeprefix(_PREFIX)
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            _remove(device.name)
