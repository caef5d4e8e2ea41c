"""A small real service for the supervisor's tests: `fake_service.py <behaviour>`, in the standard library only.

It says READY=1 as services do, answers /health where it stands in for the gateway, and ends at SIGTERM.
"""

from __future__ import annotations

import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path


def notify(state: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.sendto(state.encode(), os.environ["NOTIFY_SOCKET"])


class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        print(f"asked for {self.path}", file=sys.stderr, flush=True)


def main(behaviour: str) -> int:
    # Waited for, not handled: a handler that wakes its own main thread can deadlock with it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGINT, lambda *_: print("got SIGINT", file=sys.stderr, flush=True))
    if behaviour == "breaks":
        print("cannot open the frobnicator", file=sys.stderr)
        return 3
    if behaviour == "already_running":
        print("storage of node x is already running: pid 1 on y holds it", file=sys.stderr)
        return 9
    if behaviour == "other_version":
        print("storage of node y runs Shoal '2.0.0', and storage of node x is '1.0.0'", file=sys.stderr)
        return 10
    if behaviour == "parent":
        # The stage of an instance: nothing tells it to end but its group.
        stage = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
        print(f"stage {stage.pid}", file=sys.stderr, flush=True)
    if behaviour == "writes":
        (Path(os.environ["SHOAL_HOME"]) / "written").write_text("as every child does")
    if behaviour == "gateway":
        server = http.server.HTTPServer(("127.0.0.1", int(os.environ["SHOAL_GATEWAY_PORT"])), Health)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"{behaviour} began, pid {os.getpid()}", file=sys.stderr, flush=True)
    if behaviour != "silent":
        notify("READY=1")
    asked_s = 0.0
    while True:
        signal.sigwait({signal.SIGTERM})
        asked_s = asked_s or time.monotonic()
        # The kernel may ask several times at once, for each thread of the supervisor that dies: that is once.
        if behaviour == "deaf" and time.monotonic() - asked_s < 0.1:
            continue
        if behaviour != "stubborn":
            break
    print("stopping", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
