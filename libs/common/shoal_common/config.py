"""What a service is told from outside, read once into frozen values.

`<home>/node.toml` holds what must survive: the node's id and a person's settings. The environment (set by
`shoal up`, by systemd or by launchd) says the rest:

    SHOAL_HOME       the node's directory                        ~/.shoal
    SHOAL_NATS       NATS servers, comma-separated               nats://127.0.0.1:4222
    SHOAL_BIND       address that data ports bind                127.0.0.1
    SHOAL_ADVERTISE  addresses peers use, comma-separated        the bound one, or every interface's (interfaces.py)
    SHOAL_SECRET     shared by the cluster's nodes; needed beyond loopback
    SHOAL_LOG        debug, info, warning                        info
    SHOAL_REPLICAS   copies of streams and buckets in a NATS cluster   1
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import secrets
import socket
import stat
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from shoal_common import reach
from shoal_common.errors import BadInput, BadName
from shoal_common.interfaces import Interface
from shoal_common.messages.facts import Link
from shoal_common.names import check_node, node_id_from_hostname
from shoal_common.subjects import ANY

_RESERVED_IDS = {ANY: "stands for all of them", "hub": "is how downloads name the hub"}
DEFAULT_NATS = "nats://127.0.0.1:4222"


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """What every service knows about itself and its node."""

    service: str
    node: str
    home: Path
    nats: list[str]
    bind: str = "127.0.0.1"
    advertise: list[str] = []
    secret: str = ""
    log_level: str = "info"
    replicas: int = 1
    settings: dict[str, Any] = {}
    """The parsed node.toml."""

    @property
    def store(self) -> Path:
        """Where this node's models live."""
        section = self.settings.get("storage", {})
        path = section.get("path") if isinstance(section, dict) else None
        return (self.home / Path(str(path)).expanduser()) if path else self.home / "store"

    def links(self, port: int, interfaces: Sequence[Interface]) -> list[Link]:
        """How peers reach a data port of this node, best first."""
        return reach.links(self.bind, self.advertise, port, interfaces)


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only. Raises BadInput for what is no address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise BadInput(f"{host!r} is not an address to bind: give one like 127.0.0.1 or 0.0.0.0") from None


def home_directory(environ: Mapping[str, str]) -> Path:
    """The node's directory: SHOAL_HOME, or ~/.shoal."""
    return Path(environ.get("SHOAL_HOME") or Path.home() / ".shoal").absolute()


def settings_path(home: Path) -> Path:
    """The node's settings file."""
    return home / "node.toml"


def read_settings(home: Path) -> dict[str, Any]:
    """The node's settings file, or nothing where there is none. Raises BadInput naming the fault in it."""
    path = settings_path(home)
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise BadInput(f"{path} cannot be read: {e}; correct that line, or remove the file") from None


def ensure_node_id(home: Path, hostname: str | None = None) -> str:
    """This node's id, made at first and the same for ever after (I8).

    It is written durably before it is used, so that a crash cannot leave a cluster knowing a node by an id
    that the node has forgotten.
    """
    home.mkdir(parents=True, exist_ok=True)
    # A node's services may all start for the first time at once: one makes the id, the others read it.
    with settings_locked(home):
        settings = read_settings(home)
        if "id" in settings:
            return _usable_id(str(settings["id"]))
        node = _usable_id(hostname or node_id_from_hostname(socket.gethostname(), secrets.token_hex(2)))
        path = settings_path(home)
        kept = path.read_bytes() if path.exists() else b""
        first = f'# This node\'s name in the cluster. Keep it: peers know the node by it.\nid = "{node}"\n'
        write_settings(home, first.encode() + kept)
    return node


@contextmanager
def settings_locked(home: Path) -> Iterator[None]:
    """Hold the lock under which this home's node.toml is read and then written; it waits for whoever has it."""
    directory = os.open(home, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def write_settings(home: Path, data: bytes) -> None:
    """Make `data` this home's node.toml, durably, or leave the old one. Its mode stays: it may hold a secret."""
    path = settings_path(home).resolve()  # a person may keep the file elsewhere and link to it
    fresh = path.with_suffix(".new")
    try:
        with fresh.open("wb") as f:
            if path.exists():
                os.fchmod(f.fileno(), stat.S_IMODE(path.stat().st_mode))
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        fresh.replace(path)
    except OSError:
        with suppress(OSError):
            fresh.unlink()  # half a file on a full disk is in the way of nothing, but of no use either
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _usable_id(node: str) -> str:
    if check_node(node) in _RESERVED_IDS:
        raise BadName(
            f"a node cannot be called {node!r}, which {_RESERVED_IDS[node]}: give it another id in node.toml"
        )
    return node


def read_config(service: str, environ: Mapping[str, str]) -> Config:
    """All of the above for one service. Raises BadInput when something is missing or wrong."""
    home = home_directory(environ)
    bind = environ.get("SHOAL_BIND") or "127.0.0.1"
    secret = environ.get("SHOAL_SECRET", "")
    if not is_loopback(bind) and not secret:
        raise BadInput(
            f"{service} will not answer on {bind} without a credential (I12): set SHOAL_SECRET, "
            "or start the node with `shoal up --bind`, which makes one"
        )
    replicas, log_level = environ.get("SHOAL_REPLICAS") or "1", environ.get("SHOAL_LOG") or "info"
    if replicas not in ("1", "3", "5"):
        raise BadInput(f"SHOAL_REPLICAS is {replicas!r}: 1, 3 or 5 copies are possible")
    if log_level not in ("debug", "info", "warning"):
        raise BadInput(f"SHOAL_LOG is {log_level!r}: debug, info and warning are possible")
    return Config(
        service=service,
        node=ensure_node_id(home),
        home=home,
        nats=[s.strip() for s in (environ.get("SHOAL_NATS") or DEFAULT_NATS).split(",") if s.strip()],
        bind=bind,
        advertise=[a.strip() for a in environ.get("SHOAL_ADVERTISE", "").split(",") if a.strip()],
        secret=secret,
        log_level=log_level,
        replicas=int(replicas),
        settings=read_settings(home),
    )
