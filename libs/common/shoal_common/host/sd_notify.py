"""Notifications for the service manager: systemd, by sd_notify(3). launchd and `shoal up` have no watchdog; under
them a process whose event loop or shared threads are blocked ends itself, with a trace of where they are.
"""

from __future__ import annotations

import asyncio
import faulthandler
import socket
from collections.abc import Mapping

from shoal_common.concurrency.threads import shared_threads_work

BLOCKED_TIMEOUT_S = 60.0
WATCHDOG_INTERVAL_S = 5.0


class ServiceManagerNotifier:
    """Notifies the service manager; does nothing if there is none."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._path = environ.get("NOTIFY_SOCKET", "")
        self._watchdog_s = int(environ.get("WATCHDOG_USEC") or 0) / 1e6

    def notify(self, state: str) -> None:
        """Send `READY=1`, `STOPPING=1` or `STATUS=…`. Errors are ignored."""
        if not self._path:
            return
        # A leading '@' means the abstract namespace, which sockets write as NUL.
        address = "\0" + self._path[1:] if self._path.startswith("@") else self._path
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
            s.setblocking(False)
            try:
                s.sendto(state.encode(), address)
            except OSError:
                return

    async def watchdog_forever(self) -> None:
        """Keep the watchdog satisfied while the event loop runs and its shared threads do what they are given."""
        if self._watchdog_s:
            while True:
                await shared_threads_work()
                self.notify("WATCHDOG=1")
                await asyncio.sleep(self._watchdog_s / 3)
        try:
            while True:
                faulthandler.dump_traceback_later(BLOCKED_TIMEOUT_S, exit=True)
                await asyncio.sleep(WATCHDOG_INTERVAL_S)
                await shared_threads_work()
        finally:
            faulthandler.cancel_dump_traceback_later()
