"""Run the tiny hub as a process.

    python -m shoal_demo.hub --root DIR --port 0 --ports-file FILE

Port 0 takes a free port; it is printed, and written to the ports file as {"host", "port", "base_url"} once the hub
accepts connections. /_faults and /_stats are for the demo and tests only and have no authentication: `--no-admin`
removes them, and the default host is loopback.
"""

import argparse
import json
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from shoal_demo import MODELS_DIR
from shoal_demo.app import DemoHub, HubConfig

LISTEN_BACKLOG = 256
STOP_TIMEOUT_S = 2


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; connections queue up until a server accepts them."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(LISTEN_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def base_url(listener: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(hub: DemoHub) -> uvicorn.Server:
    """Return a server of the hub. It leaves the logging of its process alone."""
    return uvicorn.Server(
        uvicorn.Config(
            hub.app,
            log_config=None,
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=STOP_TIMEOUT_S,
        )
    )


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m shoal_demo.hub", description="The tiny hub of the Shoal demo.")
    parser.add_argument(
        "--root", type=Path, default=MODELS_DIR, help="directory with <org>/<name>/... (default: the packaged models)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=0, help="port to listen on; 0 takes a free one")
    parser.add_argument("--fd", type=int, help="inherited listening socket, instead of host and port")
    parser.add_argument("--ports-file", type=Path, help="write host, port and base_url to this file, as JSON")
    parser.add_argument("--page-size", type=int, default=HubConfig.page_size, help="items per page of a tree listing")
    parser.add_argument(
        "--lfs-from-bytes",
        type=int,
        default=HubConfig.lfs_from_bytes,
        help="files of at least this size are LFS files",
    )
    parser.add_argument("--lfs-base-url", help="base URL that LFS files are redirected to, if not this hub")
    parser.add_argument("--token-file", type=Path, help="file with the bearer token that every request needs")
    parser.add_argument("--no-admin", action="store_true", help="disable /_faults and /_stats")
    options = parser.parse_args(arguments)
    if not options.root.is_dir():
        parser.error(f"--root {options.root} is not a directory: create it, with models in <org>/<name>/")
    return options


def write_ports_file(path: Path, listener: socket.socket) -> None:
    """Write the address of the hub atomically, so that a reader never sees a partial file."""
    host, port = listener.getsockname()[:2]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(
        json.dumps({"host": host, "port": port, "base_url": base_url(listener)}) + "\n", encoding="utf-8"
    )
    temporary.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; return the exit code."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        token = options.token_file.read_text(encoding="utf-8").strip() if options.token_file else None
        listener = socket.socket(fileno=options.fd) if options.fd is not None else listen(options.host, options.port)
    except OSError as error:
        print(f"the hub cannot start: {error}; check --token-file, --host and --port", file=sys.stderr)
        return 1
    config = HubConfig(
        root=options.root,
        page_size=options.page_size,
        lfs_from_bytes=options.lfs_from_bytes,
        lfs_base_url=options.lfs_base_url,
        token=token,
        admin=not options.no_admin,
    )
    if options.ports_file is not None:
        write_ports_file(options.ports_file, listener)
    print(f"hub: {base_url(listener)} serves {options.root}", flush=True)
    make_server(DemoHub(config)).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
