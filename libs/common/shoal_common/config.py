"""A service's configuration, read once into a frozen value.

`<home>/node.toml` holds what must survive: the node's id and a person's settings. Environment variables (set by
`shoal up`, systemd or launchd) hold the rest:

    SHOAL_HOME       the node's directory                        ~/.shoal
    SHOAL_NATS       NATS servers, comma-separated               those in node.toml, or 127.0.0.1:4222
    SHOAL_BIND       address that data ports listen on           `bind` in `[node]`, or 127.0.0.1
    SHOAL_ADVERTISE  addresses for peers, comma-separated        the bound one, or every interface's (interfaces.py)
    SHOAL_LOG        debug, info, warning                        info
    SHOAL_REPLICAS   copies of streams and buckets in a NATS cluster   1
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from msgspec import structs

from shoal_common.bus.subjects import ANY
from shoal_common.errors import BadInput, BadName, Refused
from shoal_common.host import addresses
from shoal_common.host.file_kinds import read_text_file
from shoal_common.host.interfaces import Interface
from shoal_common.host.private_files import directory_locked, make_home, open_private, replace_private
from shoal_common.identity.node_identity import NodeIdentity, load_identity
from shoal_common.messages.liveness import NodeAddress
from shoal_common.names import check_node, node_id_from_hostname
from shoal_common.settings.node import NodeSettings, StorageSettings
from shoal_common.settings.values import read_settings, read_valid_settings

NATS_PORT = NodeSettings().nats_port
CLUSTER_SECTION = "cluster"
"""Of node.toml: where the cluster is that this node has joined."""
_RESERVED_IDS = {ANY: "stands for all nodes", "hub": "is the hub's name in downloads"}


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """What every service knows about itself and its node."""

    service: str
    node: str
    home: Path
    nats: list[str]
    bind: str = "127.0.0.1"
    advertise: list[str] = []
    log_level: str = "info"
    replicas: int = 1
    settings: dict[str, Any] = {}
    """The parsed node.toml."""
    identity: NodeIdentity | None = None
    """This node's keys; None outside a cluster."""

    @property
    def store(self) -> Path:
        """Directory of this node's store."""
        return store_directory(self.home, self.settings)

    def links(
        self, port: int, interfaces: Sequence[Interface], bind: str = "", tls: bool = False
    ) -> list[NodeAddress]:
        """Return the addresses of a data port of this node, best first; `bind` if it has an address of its own."""
        links = addresses.published_addresses(bind or self.bind, self.advertise, port, interfaces)
        return [structs.replace(link, tls=tls) for link in links]


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached from this machine only. Raises BadInput if it is not an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise BadInput(f"{host!r} is not an address to listen on: give one like 127.0.0.1 or 0.0.0.0") from None


def check_bind(service: str, bind: str, identity: NodeIdentity | None) -> None:
    """Refuse to listen beyond loopback outside a cluster (I12). Raises BadInput."""
    if not is_loopback(bind) and identity is None:
        raise BadInput(
            f"{service} will not listen on {bind} without an identity (I12): start the cluster's first node with "
            "`shoal up --bind`, the others after `shoal join`"
        )


def home_directory(environ: Mapping[str, str]) -> Path:
    """Return the node's directory: SHOAL_HOME, or ~/.shoal."""
    return Path(environ.get("SHOAL_HOME") or Path.home() / ".shoal").absolute()


def store_directory(home: Path, settings: Mapping[str, object]) -> Path:
    """Return the store's directory: `path` in `[storage]`, or `<home>/store` where that is unset or invalid."""
    storage, _ = read_valid_settings(StorageSettings, settings, {})
    return home / Path(storage.path or "store").expanduser()


def settings_path(home: Path) -> Path:
    """Return the path of the node's settings file."""
    return home / "node.toml"


def read_settings_file(home: Path) -> dict[str, Any]:
    """Read the node's settings file; empty if there is none. Raises BadInput naming the faulty line."""
    path = settings_path(home)
    try:
        return tomllib.loads(read_text_file(path))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as e:  # also a number of 4,300 digits
        raise BadInput(f"{path} cannot be read: {e}; correct that line, or put the file back from a copy") from None


def saved_node_id(home: Path) -> str:
    """Return the id of the node of a home; "" where there is none yet. Raises BadInput for a damaged file."""
    return str(read_settings_file(home).get("id", ""))


def ensure_node_id(home: Path, hostname: str | None = None) -> str:
    """Return this node's id, created at the first start and permanent from then on (I8).

    It is durable before it is used, so that after a crash the cluster does not know a node by an id that the node has
    lost. Raises Refused for a home that has lost its id, unless `hostname` is that id.
    """
    make_home(home)
    # All services of a node may start for the first time at once: one creates the id, the others read it.
    with directory_locked(home):
        settings = read_settings_file(home)
        if "id" in settings:
            node = _usable_id(str(settings["id"]))
            _record_id(home, node)
            return node
        _refuse_lost_id(home, hostname)
        node = _usable_id(hostname or node_id_from_hostname(socket.gethostname(), secrets.token_hex(2)))
        path = settings_path(home)
        existing = path.read_bytes() if path.exists() else b""
        id_line = f'# This node\'s name in the cluster. Keep it: peers know the node by it.\nid = "{node}"\n'
        write_settings(home, id_line.encode() + existing)
        _record_id(home, node)
    return node


def _record_id(home: Path, node: str) -> None:
    """Keep the id beside node.toml too: a node that loses that file must not become another one unnoticed."""
    record = home / "node.id"
    # A full disk must not keep storage from starting, which can free space.
    with suppress(OSError, BadInput):
        if not record.exists() or read_text_file(record).strip() != node:
            with os.fdopen(open_private(record, os.O_WRONLY | os.O_TRUNC), "w") as f:
                f.write(f"{node}\n")


def _refuse_lost_id(home: Path, given: str | None) -> None:
    path, record = settings_path(home), home / "node.id"
    what = f"{path} {'has no id' if path.exists() else 'is missing'}"
    recorded = read_text_file(record).strip() if record.exists() else ""
    if recorded and given != recorded:
        raise Refused(
            f"{what}, but this is the home of node {recorded}: put the file back from a copy, or write the id again "
            f"with `shoal up --node {recorded}` (the settings in it are lost)"
        )
    if not recorded and not given and (home / "store" / "VERSION").exists():
        raise Refused(
            f"{what}, but {home / 'store'} is the store of a node: put the file back from a copy, or name that node "
            f"with `shoal up --node NAME`; its logs in {home / 'log'} have the name"
        )


def write_settings(home: Path, data: bytes) -> None:
    """Replace this home's node.toml durably, or leave the old one. It is private: it may hold a secret."""
    replace_private(settings_path(home).resolve(), data)  # the file may be a link


def _usable_id(node: str) -> str:
    if check_node(node) in _RESERVED_IDS:
        raise BadName(
            f"a node cannot be called {node!r}, which {_RESERVED_IDS[node]}: give it another id in node.toml"
        )
    return node


def cluster_servers(settings: Mapping[str, Any]) -> Any:
    """Return the NATS servers of the cluster that this node has joined, as node.toml has them; empty if none."""
    return settings.get(CLUSTER_SECTION, {}).get("nats", [])


def saved_servers(settings: Mapping[str, Any]) -> Any:
    """Return the NATS servers that node.toml names: the joined cluster's, else those given to `shoal up --nats`.

    `nats` outside of any section is how the latter were written by hand before they were kept.
    """
    node = settings.get(NodeSettings.section, {})
    given = node.get("nats") if isinstance(node, Mapping) else None
    return cluster_servers(settings) or given or settings.get("nats", [])


def local_server(is_member: bool) -> str:
    """Return the URL of a NATS server of this machine on the usual port: a cluster's speaks TLS."""
    return f"{'tls' if is_member else 'nats'}://127.0.0.1:{NATS_PORT}"


def read_config(service: str, environ: Mapping[str, str]) -> Config:
    """Return one service's configuration. Raises BadInput if something is missing or wrong."""
    home = home_directory(environ)
    node, settings = ensure_node_id(home), read_settings_file(home)
    node_settings = read_settings(NodeSettings, settings, environ)
    bind = node_settings.bind or "127.0.0.1"
    identity = load_identity(home, node)
    check_bind(service, bind, identity)
    given = list(node_settings.nats) if environ.get("SHOAL_NATS") else []
    replicas, log_level = environ.get("SHOAL_REPLICAS") or "1", environ.get("SHOAL_LOG") or "info"
    if replicas not in ("1", "3", "5"):
        raise BadInput(f"SHOAL_REPLICAS is {replicas!r}: set 1, 3 or 5")
    if log_level not in ("debug", "info", "warning"):
        raise BadInput(f"SHOAL_LOG is {log_level!r}: set debug, info or warning")
    return Config(
        service=service,
        node=node,
        home=home,
        nats=given or [str(s) for s in saved_servers(settings)] or [local_server(identity is not None)],
        bind=bind,
        advertise=[a.strip() for a in environ.get("SHOAL_ADVERTISE", "").split(",") if a.strip()],
        log_level=log_level,
        replicas=int(replicas),
        settings=settings,
        identity=identity,
    )
