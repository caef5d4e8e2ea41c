"""Telling the supervisor: systemd by its datagram protocol (sd_notify(3)); launchd and `shoal up` have no watchdog,

so there a stuck event loop ends its own process, with a trace of where it was stuck.
"""

from __future__ import annotations

import asyncio
import faulthandler
import socket
from collections.abc import Mapping

_STUCK_S = 60.0
_BEAT_S = 5.0


class Supervisor:
    """What we tell the supervisor. Says nothing when there is none."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._path = environ.get("NOTIFY_SOCKET", "")
        self._watchdog_s = int(environ.get("WATCHDOG_USEC") or 0) / 1e6

    def tell(self, state: str) -> None:
        """`READY=1`, `STOPPING=1`, `STATUS=…`. A supervisor that does not listen is no reason to fail."""
        if not self._path:
            return
        # A leading '@' means the abstract namespace, which sockets spell with a NUL.
        address = "\0" + self._path[1:] if self._path.startswith("@") else self._path
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
            s.setblocking(False)
            try:
                s.sendto(state.encode(), address)
            except OSError:
                return

    async def watchdog_forever(self) -> None:
        """Prove that the event loop turns."""
        if self._watchdog_s:
            while True:
                self.tell("WATCHDOG=1")
                await asyncio.sleep(self._watchdog_s / 3)
        try:
            while True:
                faulthandler.dump_traceback_later(_STUCK_S, exit=True)
                await asyncio.sleep(_BEAT_S)
        finally:
            faulthandler.cancel_dump_traceback_later()
