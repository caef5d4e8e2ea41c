"""What a node can serve: ranges of a blob by the real fileserver, compared with nginx's sendfile on the same file.

- `serve_vs_nginx`: bytes per second in ranges of 32 MiB, over nginx's.
- `serve_vs_nginx_1m`: the same in ranges of one leaf.
- `serve_gb_per_s`, `serve_gb_per_s_1m`, and `nginx_…`: the absolute rates.
- `slow_connections_throughput`: with 500 more connections that read a few KiB now and then, over without them.

Every request carries a token, as between nodes. The readers are 4 connections of another process that discard what
they read. Without nginx (`scripts/system-packages.sh bench` installs it) the ratios are left out.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from figures import Figure, figure, interleaved, report  # noqa: E402  # after the path is set
from shoal_common.host.credentials import blob_token  # noqa: E402
from tests.fileserver.running_fileserver import Fileserver, serving  # noqa: E402
from tests.harness.nats import NatsServer  # noqa: E402

QUICK = "--quick" in sys.argv
ROUNDS = 3 if QUICK else 7
READ_S = 1.0 if QUICK else 2.0
BLOB_BYTES = (256 if QUICK else 512) << 20
RANGES = {"": 32 << 20, "_1m": 1 << 20}
READERS = 4
SLOW_COUNT = 500
SLOW_BYTES = 4096
SECRET = "of the bench"
SLOW_HOST = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
"""Only Linux has more than one loopback address by default."""

_NGINX = """
{user} daemon off; worker_processes 1; pid {root}/pid; error_log {root}/error.log;
events {{ worker_connections 1024; }}
http {{
  access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000000;
  client_body_temp_path {root}/t; proxy_temp_path {root}/t; fastcgi_temp_path {root}/t; uwsgi_temp_path {root}/t;
  scgi_temp_path {root}/t;
  server {{ listen 127.0.0.1:{port}; root {root}/www; }}
}}
"""


def read(port: int, path: str, authorization: str, range_bytes: int) -> float:
    """Return the bytes per second that readers in this process get."""
    counts = [0] * READERS
    stop_s = time.monotonic() + READ_S

    def one(number: int) -> None:
        draw, buffer = random.Random(number), memoryview(bytearray(1 << 20))
        with socket.create_connection(("127.0.0.1", port)) as connection:
            while time.monotonic() < stop_s:
                start = draw.randrange(BLOB_BYTES // range_bytes) * range_bytes
                asked = (
                    f"GET {path} HTTP/1.1\r\nHost: localhost\r\nRange: bytes={start}-{start + range_bytes - 1}\r\n"
                )
                shown = f"Authorization: {authorization}\r\n" if authorization else ""
                connection.sendall(f"{asked}{shown}\r\n".encode())
                got = connection.recv_into(buffer)
                head, _, body = bytes(buffer[:got]).partition(b"\r\n\r\n")
                if not head.startswith(b"HTTP/1.1 206 "):
                    raise RuntimeError(f"answered {head.splitlines()[0]!r}")
                left = range_bytes - len(body)
                while left:
                    got = connection.recv_into(buffer[:left] if left < len(buffer) else buffer)
                    if not got:
                        raise RuntimeError("a reader was cut off")
                    left -= got
                counts[number] += range_bytes

    threads = [threading.Thread(target=one, args=(number,)) for number in range(READERS)]
    started_s = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not any(counts):
        raise SystemExit("the readers received nothing")
    return sum(counts) / (time.monotonic() - started_s)


async def read_slowly(port: int, path: str, authorization: str) -> None:
    """Request a whole blob on many connections and read very little of it; reconnect when disconnected."""

    async def one() -> None:
        asked = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {authorization}\r\n\r\n".encode()
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1, local_addr=(SLOW_HOST, 0))
                writer.write(asked)
                while await reader.read(SLOW_BYTES):  # noqa: ASYNC110  # slowness is the point
                    await asyncio.sleep(1)
            except OSError:
                pass
            await asyncio.sleep(1)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(SLOW_COUNT):
            tasks.create_task(one())
        await asyncio.sleep(2)
        print("reading", flush=True)


def elsewhere(what: str, *arguments: str) -> subprocess.Popen[str]:
    """Run this script in another process, as a reader."""
    command = [sys.executable, __file__, *sys.argv[1:], "--as", what, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def rate(port: int, path: str, authorization: str, range_bytes: int) -> float:
    """Return the bytes per second that readers in another process get."""
    reading = elsewhere("reader", str(port), path, authorization, str(range_bytes))
    output, _ = reading.communicate()
    if reading.returncode:
        raise SystemExit("the readers failed")
    return float(output)


def disturbed(port: int, path: str, authorization: str, range_bytes: int) -> float:
    """Return the same while others hold connections and hardly read."""
    slow = elsewhere("slow", str(port), path, authorization)
    try:
        if not slow.stdout or slow.stdout.readline() != "reading\n":
            raise SystemExit("the slow readers failed")
        return rate(port, path, authorization, range_bytes)
    finally:
        slow.kill()
        slow.wait()


@contextmanager
def nginx(directory: Path, file: Path) -> Iterator[int | None]:
    """Return the port of an nginx that serves a file as /blob; None without nginx."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if program is None:
        print("nginx is not installed: its figures are left out (scripts/system-packages.sh bench)", file=sys.stderr)
        yield None
        return
    user = "user root;" if os.geteuid() == 0 else ""  # or its worker may not read our temporary directory
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    (directory / "www").mkdir(parents=True)
    (directory / "www" / "blob").symlink_to(file)
    (directory / "nginx.conf").write_text(_NGINX.format(root=directory, port=port, user=user))
    with subprocess.Popen([program, "-e", f"{directory}/error.log", "-c", f"{directory}/nginx.conf"]) as running:
        try:
            yield port
        finally:
            running.terminate()


def measure(server: Fileserver, path: str, authorization: str, beside: int | None) -> dict[str, Figure]:
    """Measure a running fileserver."""
    figures: dict[str, Figure] = {}
    for suffix, range_bytes in RANGES.items():
        contenders: dict[str, Callable[[], float]] = {
            "serve": partial(rate, server.port, path, authorization, range_bytes)
        }
        if beside is not None:
            contenders["nginx"] = partial(rate, beside, "/blob", "", range_bytes)
        for contender in contenders.values():
            contender()  # the first read finds cold caches
        found = interleaved(contenders, ROUNDS)
        if beside is not None:
            figures[f"serve_vs_nginx{suffix}"] = figure(found["serve"] / found["nginx"], "x", ">= 0.9")
        figures |= {f"{name}_gb_per_s{suffix}": figure(value / 1e9, "GB/s") for name, value in found.items()}
    asked = (server.port, path, authorization, RANGES[""])
    found = interleaved({"alone": partial(rate, *asked), "beside": partial(disturbed, *asked)}, ROUNDS)
    figures["slow_connections_throughput"] = figure(found["beside"] / found["alone"], "x", ">= 0.9")
    return figures


async def main() -> None:
    """Measure and report."""
    with tempfile.TemporaryDirectory() as name, NatsServer(Path(name) / "nats") as nats:
        async with serving(nats, Path(name), "bench", SHOAL_SECRET=SECRET) as server:
            blob = server.add(os.urandom(1 << 20) * (BLOB_BYTES >> 20))
            shown = blob_token(SECRET, "bench", blob, time.time())["Authorization"]
            with nginx(Path(name) / "nginx", server.layout.blob(blob)) as beside:
                figures = await asyncio.to_thread(measure, server, f"/v1/blobs/{blob}", shown, beside)
    report(figures)


if __name__ == "__main__":
    if "--as" in sys.argv:
        role, port, path, *more = sys.argv[sys.argv.index("--as") + 1 :]
        if role == "reader":
            print(read(int(port), path, more[0], int(more[1])))
        else:
            asyncio.run(read_slowly(int(port), path, more[0]))
    else:
        asyncio.run(main())
