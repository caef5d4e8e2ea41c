"""What a node can serve: ranges of a blob by the real fileserver, compared with nginx's sendfile on the same file.

- `serve_vs_nginx`: bytes per second in ranges of 32 MiB, over nginx's.
- `serve_vs_nginx_1m`: the same in ranges of one leaf.
- `serve_gb_per_s`, `serve_gb_per_s_1m`, and `nginx_…`: the absolute rates.
- `tls_over_plain`, `tls_over_plain_1m`: the rates inside TLS, as between machines, over those without. The readers
  decrypt, on the same processor.
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
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

import msgspec  # noqa: E402  # after the path is set

from figures import Figure, figure, interleaved, report  # noqa: E402
from shoal_common.identity.certificates import node_host  # noqa: E402
from shoal_common.identity.node_identity import NodeIdentity  # noqa: E402
from shoal_common.identity.tls import client_context  # noqa: E402
from tests.fileserver.running_fileserver import Fileserver, admitted, serving  # noqa: E402
from tests.harness.identities import Authority  # noqa: E402
from tests.harness.nats import NatsServer  # noqa: E402

QUICK = "--quick" in sys.argv
ROUNDS = 3 if QUICK else 7
READ_S = 1.0 if QUICK else 2.0
BLOB_BYTES = (256 if QUICK else 512) << 20
RANGES = {"": 32 << 20, "_1m": 1 << 20}
READERS = 4
SLOW_COUNT = 500
SLOW_BYTES = 4096
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


class Target(msgspec.Struct, frozen=True):
    """What is read: a blob of a server. `tls_home` is the home of the node that serves it inside TLS; "" for none."""

    port: int
    path: str
    authorization: str = ""
    tls_home: str = ""

    def connected(self) -> socket.socket:
        """Return a new connection."""
        connection = socket.create_connection(("127.0.0.1", self.port))
        if not self.tls_home:
            return connection
        home = Path(self.tls_home)
        context = client_context(NodeIdentity(home, home.name).authority)
        return context.wrap_socket(connection, server_hostname=node_host(home.name))


def read(target: Target, range_bytes: int) -> float:
    """Return the bytes per second that readers in this process get."""
    counts = [0] * READERS
    stop_s = time.monotonic() + READ_S

    def one(number: int) -> None:
        draw, buffer = random.Random(number), memoryview(bytearray(1 << 20))
        with target.connected() as connection:
            while time.monotonic() < stop_s:
                start = draw.randrange(BLOB_BYTES // range_bytes) * range_bytes
                wanted = f"Range: bytes={start}-{start + range_bytes - 1}"
                asked = f"GET {target.path} HTTP/1.1\r\nHost: localhost\r\n{wanted}\r\n"
                shown = f"Authorization: {target.authorization}\r\n" if target.authorization else ""
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


async def read_slowly(target: Target) -> None:
    """Request a whole blob on many connections and read very little of it; reconnect when disconnected."""

    async def one() -> None:
        shown = f"Authorization: {target.authorization}"
        asked = f"GET {target.path} HTTP/1.1\r\nHost: localhost\r\n{shown}\r\n\r\n".encode()
        while True:
            try:
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", target.port, limit=1, local_addr=(SLOW_HOST, 0)
                )
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


def elsewhere(what: str, target: Target, range_bytes: int = 0) -> subprocess.Popen[str]:
    """Run this script in another process, as a reader."""
    text = msgspec.json.encode(target).decode()
    command = [sys.executable, __file__, *sys.argv[1:], "--as", what, text, str(range_bytes)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def rate(target: Target, range_bytes: int) -> float:
    """Return the bytes per second that readers in another process get."""
    reading = elsewhere("reader", target, range_bytes)
    output, _ = reading.communicate()
    if reading.returncode:
        raise SystemExit("the readers failed")
    return float(output)


def disturbed(target: Target, range_bytes: int) -> float:
    """Return the same while others hold connections and hardly read."""
    slow = elsewhere("slow", target)
    try:
        if not slow.stdout or slow.stdout.readline() != "reading\n":
            raise SystemExit("the slow readers failed")
        return rate(target, range_bytes)
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


def measure(plain: Target, encrypted: Target, beside: int | None) -> dict[str, Figure]:
    """Measure running fileservers, and nginx on a port beside them."""
    figures: dict[str, Figure] = {}
    for suffix, range_bytes in RANGES.items():
        contenders: dict[str, Callable[[], float]] = {
            "serve": partial(rate, plain, range_bytes),
            "tls": partial(rate, encrypted, range_bytes),
        }
        if beside is not None:
            contenders["nginx"] = partial(rate, Target(beside, "/blob"), range_bytes)
        for contender in contenders.values():
            contender()  # the first read finds cold caches
        found = interleaved(contenders, ROUNDS)
        if beside is not None:
            figures[f"serve_vs_nginx{suffix}"] = figure(found["serve"] / found["nginx"], "x", ">= 0.9")
        figures[f"tls_over_plain{suffix}"] = figure(found["tls"] / found["serve"], "x")
        figures |= {f"{name}_gb_per_s{suffix}": figure(value / 1e9, "GB/s") for name, value in found.items()}
    asked = (plain, RANGES[""])
    found = interleaved({"alone": partial(rate, *asked), "beside": partial(disturbed, *asked)}, ROUNDS)
    figures["slow_connections_throughput"] = figure(found["beside"] / found["alone"], "x", ">= 0.9")
    return figures


async def main() -> None:
    """Measure and report."""
    data = os.urandom(1 << 20) * (BLOB_BYTES >> 20)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        authority = Authority(directory)
        nats = stack.enter_context(NatsServer(directory / "nats", authority=authority))
        reader, *_ = await admitted(nats, authority, directory, "reader", "plain", "tls")
        async with (
            serving(nats, directory, "plain") as plain,
            serving(nats, directory, "tls", SHOAL_BIND="0.0.0.0") as encrypted,
        ):

            def target(server: Fileserver, tls_home: str = "") -> Target:
                blob = server.add(data)
                token = reader.token(server.node, blob, time.time())["Authorization"]
                return Target(server.port, f"/v1/blobs/{blob}", token, tls_home)

            blob = plain.add(data)
            with nginx(directory / "nginx", plain.layout.blob(blob)) as beside:
                targets = target(plain), target(encrypted, str(directory / "tls"))
                figures = await asyncio.to_thread(measure, *targets, beside)
    report(figures)


if __name__ == "__main__":
    if "--as" in sys.argv:
        role, text, range_text = sys.argv[sys.argv.index("--as") + 1 :]
        asked_target = msgspec.json.decode(text, type=Target)
        if role == "reader":
            print(read(asked_target, int(range_text)))
        else:
            asyncio.run(read_slowly(asked_target))
    else:
        asyncio.run(main())
