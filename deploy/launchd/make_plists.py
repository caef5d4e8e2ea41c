"""Write launchd agents for Shoal.

    python deploy/launchd/make_plists.py --venv ~/.local/share/shoal/venv --into ~/Library/LaunchAgents

By default one agent, which runs `shoal up`: its supervisor keeps the services running and their logs bounded. With
`--per-service` launchd supervises each service and NATS itself; nothing rotates their logs then, so the script also
prints lines for /etc/newsyslog.d, which only an administrator can install.
"""

from __future__ import annotations

import argparse
import os
import plistlib
import sys
from pathlib import Path
from typing import Any

SERVICES = ("storage", "fetcher", "fileserver", "placement", "inference", "gateway")
PRIVATE_UMASK = 0o077
"""Only this user may read logs and plists."""
STOP_S = 35
"""launchd's default of 20 s is less than `shoal up` may need: 17 s for the services, 10 s for NATS."""


def agent(name: str, arguments: list[str], home: Path, environ: dict[str, str]) -> dict[str, Any]:
    """One agent: started at login, and again whenever it ends."""
    return {
        "Label": f"org.shoal.{name}",
        "ProgramArguments": arguments,
        "EnvironmentVariables": {"SHOAL_HOME": str(home), "PYTHONUNBUFFERED": "1", **environ},
        "RunAtLoad": True,
        "KeepAlive": True,
        "ThrottleInterval": 5,
        "ExitTimeOut": STOP_S,
        # Without this macOS slows down what has no window.
        "ProcessType": "Interactive",
        "WorkingDirectory": str(home),
        "Umask": PRIVATE_UMASK,
        "StandardOutPath": str(home / "log" / f"{name}.launchd.log"),
        "StandardErrorPath": str(home / "log" / f"{name}.launchd.log"),
    }


def agents(venv: Path, home: Path, per_service: bool, environ: dict[str, str]) -> dict[str, dict[str, Any]]:
    """All agents by name."""
    binaries = venv / "bin"
    if not per_service:
        return {"node": agent("node", [str(binaries / "shoal"), "up"], home, environ)}
    python = [str(binaries / "python"), "-P", "-m"]
    found = {s: agent(s, [*python, f"shoal_{s}"], home, _for(s, environ)) for s in SERVICES}
    nats = [str(binaries / "shoal"), "up", "--only-nats"]
    return {"nats": agent("nats", nats, home, _for("nats", environ)), **found}


def _for(service: str, environ: dict[str, str]) -> dict[str, str]:
    # The hub's token is the fetcher's alone (I12).
    return {k: v for k, v in environ.items() if k != "HF_TOKEN" or service == "fetcher"}


def main() -> int:
    """Write the plists, readable by this user only: they may hold a secret."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, required=True, help="where Shoal is installed")
    parser.add_argument("--into", type=Path, default=Path.home() / "Library" / "LaunchAgents")
    parser.add_argument("--home", type=Path, default=Path.home() / ".shoal")
    parser.add_argument("--per-service", action="store_true")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="SHOAL_NATS=…, SHOAL_BIND=…")
    given = parser.parse_args()
    os.umask(PRIVATE_UMASK)
    environ = dict(pair.split("=", 1) for pair in given.env if "=" in pair)
    home = given.home.expanduser().absolute()
    (home / "log").mkdir(parents=True, exist_ok=True)
    given.into.mkdir(parents=True, exist_ok=True)
    for name, plist in agents(given.venv.expanduser().absolute(), home, given.per_service, environ).items():
        path = given.into / f"org.shoal.{name}.plist"
        path.touch()
        path.write_bytes(plistlib.dumps(plist))
        sys.stdout.write(f"launchctl bootstrap gui/$(id -u) {path}\n")
        if given.per_service:
            sys.stderr.write(f"# /etc/newsyslog.d/shoal.conf: {plist['StandardErrorPath']} 600 3 10240 * N\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
