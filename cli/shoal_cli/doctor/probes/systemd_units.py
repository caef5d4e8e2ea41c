"""The status of Shoal's systemd units of this user. Blocks, at most _DEADLINE_S."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from shoal_cli.doctor.checks.services import SystemdUnit
from shoal_common.names import SERVICES

_DEADLINE_S = 3.0
_UNITS = Path(".config") / "systemd" / "user"
_PROPERTIES = "Id,ActiveState,Result,NRestarts"


def probe(user_home: Path) -> list[SystemdUnit]:
    """Return the units installed for this user; none where systemd has none, or does not answer."""
    names = [n for n in ("nats", *SERVICES) if (user_home / _UNITS / f"shoal-{n}.service").exists()]
    program = shutil.which("systemctl")
    if not names or program is None:
        return []
    command = [program, "--user", "show", f"--property={_PROPERTIES}", *(f"shoal-{n}.service" for n in names)]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_DEADLINE_S)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse(done.stdout) if done.returncode == 0 else []


def parse(text: str) -> list[SystemdUnit]:
    """Parse blocks of NAME=value, with an empty line between units. Pure."""
    units = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.partition("=")[::2] for line in block.splitlines())
        name = fields.get("Id", "").removeprefix("shoal-").removesuffix(".service")
        restarts = fields.get("NRestarts", "")
        if name:
            units.append(
                SystemdUnit(
                    name=name,
                    active=fields.get("ActiveState", ""),
                    result=fields.get("Result", ""),
                    restart_count=int(restarts) if restarts.isdecimal() else 0,
                )
            )
    return units
