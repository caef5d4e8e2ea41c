"""What `shoal up` runs: options, environment and node.toml combined into one frozen plan. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from shoal_common.config import NATS_PORT, cluster_servers, is_loopback
from shoal_common.errors import BadInput, Refused
from shoal_common.names import SERVICES
from shoal_common.redaction import HUB_TOKENS
from shoal_common.settings.declaration import Value
from shoal_common.settings.node import PortSettings, StorageSettings
from shoal_common.settings.values import by_section, changeable, read_settings

GATEWAY_PORT = PortSettings().gateway_port
LOOPBACK = "127.0.0.1"
ALL_INTERFACES = "0.0.0.0"
READY_DEADLINE_S = 60.0

# Set for each child; the supervisor's own notify socket and watchdog are not its children's.
_NOT_INHERITED = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "SHOAL_NATS", "SHOAL_BIND", "SHOAL_API_KEY")


class UpOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of `shoal up`."""

    home: str
    node: str = ""
    nats: list[str] = []
    nats_port: int = NATS_PORT
    bind: str = ""
    port: int = GATEWAY_PORT
    values: dict[str, Value] = {}
    """Storage's settings to write into node.toml, by key; None takes a value back."""
    added: dict[str, list[str]] = {}
    """Directories to add to storage's lists in node.toml, by key."""
    hub: str = ""
    without: list[str] = []
    ready_deadline_s: float = READY_DEADLINE_S


class NodePlan(msgspec.Struct, frozen=True, kw_only=True):
    """What this node runs."""

    node: str
    home: str
    bind: str
    joins: list[str]
    """NATS servers of other nodes; empty: this node runs its own, and is the cluster's operator."""
    nats_port: int
    gateway_port: int
    services: list[str]
    commands: dict[str, list[str]]
    """Programs that replace `python -m shoal_<service>`: from `[commands]` in node.toml."""
    hub: str = ""
    changes: dict[str, dict[str, Value]] = {}
    """What to set in node.toml before anything starts, by section and key; None removes a key."""
    ready_deadline_s: float = READY_DEADLINE_S

    @property
    def runs_nats(self) -> bool:
        """Return whether this node's supervisor runs NATS."""
        return not self.joins


class ChildSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A program to keep running."""

    name: str
    argv: list[str]
    environ: dict[str, str]
    directory: str
    """Its working directory: the home's `run`, never where somebody typed `shoal up`."""
    stop_s: float
    """Seconds between SIGTERM and SIGKILL."""


def make_plan(
    options: UpOptions, environ: Mapping[str, str], settings: Mapping[str, Any], node: str, is_member: bool
) -> NodePlan:
    """Return the plan for these options, this environment and this node.toml. Raises BadInput, Refused.

    `is_member`: the node has an identity, of a cluster that it has joined or started.
    """
    if environ.get("SHOAL_SECRET"):
        raise Refused(
            "SHOAL_SECRET does nothing any more, each node has keys of its own: remove it, and join with the code "
            "that `shoal invite` prints on the first node"
        )
    joins = _nats_servers(options, environ, settings)
    joins_remote = any(not host_is_loopback(url_host(u)) for u in joins)
    # A node that joined other machines must be reachable by its peers; its keys guard it.
    default = ALL_INTERFACES if joins_remote and is_member else LOOPBACK
    bind = options.bind or environ.get("SHOAL_BIND", "") or default
    is_exposed = not is_loopback(bind)
    if joins and not is_member and is_exposed:
        raise BadInput(
            f"--bind {bind} needs a cluster that knows this node (I12): run `shoal invite` on its first node and "
            "`shoal join ADDRESS` here"
        )
    services = [s for s in SERVICES if s not in options.without]
    if not services and joins:
        raise BadInput("nothing is left to run: this node's cluster has its NATS elsewhere")
    return NodePlan(
        node=node,
        home=options.home,
        bind=bind,
        joins=joins,
        nats_port=options.nats_port,
        gateway_port=options.port,
        services=services,
        commands=_commands(settings),
        hub=options.hub,
        changes=by_section(StorageSettings, _changes(options, environ, settings)),
        ready_deadline_s=options.ready_deadline_s,
    )


def _changes(options: UpOptions, environ: Mapping[str, str], settings: Mapping[str, Any]) -> dict[str, Value]:
    changes = dict(options.values)
    if options.added:
        saved = read_settings(StorageSettings, settings, {})
        for setting in changeable(StorageSettings):
            if added := options.added.get(setting.key):
                changes[setting.key] = list(dict.fromkeys([*getattr(saved, setting.name), *added]))
    for setting in changeable(StorageSettings):
        if setting.key in changes and setting.usage.flag and environ.get(setting.variable):
            raise Refused(
                f"{setting.usage.flag.name} would have no effect, because {setting.variable} is set and wins: "
                "remove one of the two"
            )
    return changes


def _nats_servers(options: UpOptions, environ: Mapping[str, str], settings: Mapping[str, Any]) -> list[str]:
    in_file = cluster_servers(settings) or settings.get("nats", [])
    if not isinstance(in_file, list) or not all(isinstance(u, str) for u in in_file):
        raise BadInput('`nats` in node.toml must be a list of URLs: nats = ["nats://host:4222"]')
    given = options.nats or [s.strip() for s in environ.get("SHOAL_NATS", "").split(",") if s.strip()] or in_file
    return [check_nats_url(u) for u in given]


def _commands(settings: Mapping[str, Any]) -> dict[str, list[str]]:
    table = settings.get("commands", {})
    try:
        commands = msgspec.convert(table, dict[str, list[str]])
    except msgspec.ValidationError:
        raise BadInput(
            '[commands] in node.toml must hold lists: storage = ["python", "-m", "shoal_storage"]'
        ) from None
    unknown = sorted(set(commands) - set(SERVICES))
    if unknown or not all(commands.values()):
        raise BadInput(
            f"[commands] in node.toml: invalid {', '.join(unknown) or 'empty list'}; "
            f"the services are {', '.join(SERVICES)}"
        )
    return commands


def service_spec(
    plan: NodePlan, service: str, nats_urls: Sequence[str], gateway_port: int, python: str, environ: Mapping[str, str]
) -> ChildSpec:
    """Return how to run one service. The hub's token goes to the fetcher only (I12)."""
    env = {k: v for k, v in environ.items() if k not in _NOT_INHERITED}
    if service != "fetcher":
        env = {k: v for k, v in env.items() if k not in HUB_TOKENS}
    env |= {
        "SHOAL_HOME": plan.home,
        "SHOAL_NATS": ",".join(nats_urls),
        "SHOAL_BIND": plan.bind,
        "SHOAL_GATEWAY_PORT": str(gateway_port),
        # A log line is written at once, not when a buffer is full.
        "PYTHONUNBUFFERED": "1",
    }
    if plan.hub:
        env["HF_ENDPOINT"] = plan.hub
    argv = plan.commands.get(service) or [python, "-P", "-m", f"shoal_{service}"]
    return ChildSpec(
        name=service,
        argv=argv,
        environ=env,
        directory=str(Path(plan.home) / "run"),
        stop_s=SERVICE_STOP_S,
    )


SERVICE_STOP_S = 17.0
"""A service that still runs 15 s after its signal exits by itself, and says which task did not end."""
NATS_STOP_S = 10.0


def nats_spec(program: Path, config: Path, environ: Mapping[str, str]) -> ChildSpec:
    """Return how to run NATS. It needs no secret from the environment and gets none (I12)."""
    env = {k: v for k, v in environ.items() if k not in _NOT_INHERITED + HUB_TOKENS}
    argv, directory = [str(program), "-c", str(config)], str(config.parent)
    return ChildSpec(name="nats", argv=argv, environ=env, directory=directory, stop_s=NATS_STOP_S)


def check_nats_url(url: str) -> str:
    """Return a NATS URL with its port; `host` and `host:port` are accepted. Raises BadInput."""
    full = url if "://" in url else f"nats://{url}"
    try:
        parts = urlsplit(full)
        port = parts.port
    except ValueError:
        port, parts = None, urlsplit("")
    if parts.scheme not in ("nats", "tls", "ws", "wss") or not parts.hostname:
        raise BadInput(f"{without_token(url)!r} is not a NATS URL: write nats://host:4222 or tls://host:4222")
    return full if port is not None else f"{full.rstrip('/')}:{NATS_PORT}"


def url_host(url: str) -> str:
    """Return the host of a URL."""
    return urlsplit(url).hostname or ""


def without_token(url: str) -> str:
    """Return a URL that may be shown: no token, no password (I12)."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme}://{rest.rsplit('@', 1)[-1]}" if separator else url.rsplit("@", 1)[-1]


def host_is_loopback(host: str) -> bool:
    """Return whether a host is a loopback address or `localhost`; any other name is not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bracketed(host: str) -> str:
    """Return a host as it is written in `host:port`."""
    return f"[{host}]" if ":" in host else host


def local_address(bind: str) -> str:
    """Return the address at which this machine reaches what is bound to `bind`."""
    if bind == "localhost" or not ipaddress.ip_address(bind).is_unspecified:
        return bind
    return "::1" if ":" in bind else LOOPBACK
