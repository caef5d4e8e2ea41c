"""Wall clocks that are wrong, of single processes: what Python's own `sitecustomize` can make them see.

Our services are Python, and see the time by `time` and `datetime` alone. The kernel stamps files, and
is right.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from tests.harness.node import Node

_HOOK = Path(__file__).with_name("wrong_clock")


class WrongClock:
    """The clock of a node, to be set while its services run."""

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
        """From now on it is so many seconds ahead; negative: behind."""
        if not self._at.exists():
            self._at.write_bytes(bytes(8))
        with self._at.open("r+b") as f:  # the very file: processes have it mapped
            f.write(struct.pack("d", ahead_s))
