"""Fill in nats-server.conf for a NATS that systemd or launchd runs. Prints it.

    python deploy/nats/fill_in.py --home ~/.shoal > ~/.shoal/nats-server.conf
    python deploy/nats/fill_in.py --home ~/.shoal --bind 0.0.0.0 > ~/.shoal/nats-server.conf   # needs ~/.shoal/secret

The result holds the cluster's secret when there is one: write it with `umask 077`.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
import sys
from pathlib import Path

_TEMPLATE = Path(__file__).with_name("nats-server.conf")


def fill_in(home: Path, bind: str, port: int, name: str, secret: str) -> str:
    """The configuration. Beyond loopback NATS asks for the secret (I12)."""

    def quoted(text: str) -> str:
        return text.replace("\\", "\\\\").replace('"', '\\"')

    listen = f"[{bind}]:{port}" if ":" in bind else f"{bind}:{port}"
    return _TEMPLATE.read_text().format(
        listen=listen,
        name=quoted(name),
        run_dir=quoted(str(home / "run")),
        store_dir=quoted(str(home / "nats")),
        authorization=f'authorization {{ token: "{quoted(secret)}" }}' if secret else "",
    )


def main() -> int:
    """Print it, or say what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path.home() / ".shoal")
    parser.add_argument("--bind", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=4222)
    parser.add_argument("--name", default=socket.gethostname(), help="the server's name, one per server")
    given = parser.parse_args()
    secret_file = given.home / "secret"
    open_to_others = not ipaddress.ip_address(given.bind).is_loopback
    secret = secret_file.read_text().strip() if secret_file.exists() and open_to_others else ""
    if open_to_others and not secret:
        sys.stderr.write(f"beyond loopback a secret is needed in {secret_file}: `openssl rand -hex 24`\n")
        return 2
    os.umask(0o077)
    (given.home / "run").mkdir(parents=True, exist_ok=True)
    sys.stdout.write(fill_in(given.home.absolute(), given.bind, given.port, given.name, secret))
    return 0


if __name__ == "__main__":
    sys.exit(main())
