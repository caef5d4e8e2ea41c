"""Wrong wall clocks for single processes, by means of Python's `sitecustomize`.

Our services are Python, and read the time only by `time` and `datetime`. The kernel stamps files with the true time.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from tests.harness.node import Node

_HOOK = Path(__file__).with_name("wrong_clock")


class WrongClock:
    """A node's clock, which can be set while its services run."""

    def __init__(self, node: Node) -> None:
        self._at = node.home / "clock"
        self.set(0.0)
        for service in node.services.values():
            there = service.environment["PYTHONPATH"]
            service.environment = {
                **service.environment,
                "PYTHONPATH": f"{_HOOK}{os.pathsep}{there}",
                "SHOAL_TEST_CLOCK": str(self._at),
            }

    def set(self, ahead_s: float) -> None:
        """Set the clock this many seconds ahead; negative: behind."""
        if not self._at.exists():
            self._at.write_bytes(bytes(8))
        with self._at.open("r+b") as f:  # the same file: processes have it mapped
            f.write(struct.pack("d", ahead_s))
