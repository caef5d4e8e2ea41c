"""What `shoal up` runs: options, environment and node.toml combined into one frozen plan. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from shoal_common.config import CLUSTER_SECTION, NATS_PORT, cluster_servers, is_loopback, saved_servers
from shoal_common.errors import BadInput, Refused
from shoal_common.names import SERVICES
from shoal_common.redaction import HUB_TOKENS
from shoal_common.settings.declaration import Value, settings_of
from shoal_common.settings.node import FileserverSettings, NodeSettings, PortSettings, StorageSettings
from shoal_common.settings.ports import chosen_port, stage_ports
from shoal_common.settings.values import by_section, changeable, read_settings, with_changes

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
    node_values: dict[str, Value] = {}
    """What to keep in `[node]` of node.toml, by key of `NodeSettings`; None goes back to the default."""
    values: dict[str, Value] = {}
    """Storage's settings to write into node.toml, by key; None takes a value back."""
    added: dict[str, list[str]] = {}
    """Directories to add to storage's lists in node.toml, by key."""
    only_nats: bool = False
    """Leave out all services, this time."""
    ready_deadline_s: float = READY_DEADLINE_S


class NodePlan(msgspec.Struct, frozen=True, kw_only=True):
    """What this node runs."""

    node: str
    home: str
    bind: str
    bind_source: str = ""
    """Where `bind` was said, and how to say another one."""
    joins: list[str]
    """NATS servers of other nodes; empty: this node runs its own, and is the cluster's operator."""
    nats_port: int
    gateway_port: int
    """0, like `nats_port`: any free one, rather the one in `chosen`."""
    fileserver_port: int = 0
    """0 unless it was set: the fileserver then finds one."""
    fileserver_bind: str = LOOPBACK
    stage_ports: list[int] = []
    """Empty unless they were set: each stage then finds one."""
    chosen: dict[str, int] = {}
    """Ports that were chosen before, by key."""
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
    node_values, environ = options.node_values, _without_given(options.node_values, environ)
    saved = with_changes(settings, NodeSettings.section, node_values)
    node_settings = read_settings(NodeSettings, saved, environ)
    joins = _nats_servers(node_values, node_settings, environ, settings)
    joins_remote = any(not host_is_loopback(url_host(u)) for u in joins)
    # A node that joined other machines must be reachable by its peers; its keys guard it.
    default = ALL_INTERFACES if joins_remote and is_member else LOOPBACK
    bind = node_settings.bind or default
    is_exposed = not is_loopback(bind)
    if joins and not is_member and is_exposed:
        raise BadInput(
            f"--bind {bind} needs a cluster that knows this node (I12): run `shoal invite` on its first node and "
            "`shoal join ADDRESS` here"
        )
    services = [] if options.only_nats else [s for s in SERVICES if s not in node_settings.without]
    if not services and joins:
        raise BadInput("nothing is left to run: this node's cluster has its NATS elsewhere")
    return NodePlan(
        node=node,
        home=options.home,
        bind=bind,
        bind_source=_bind_source(node_values, environ),
        joins=joins,
        nats_port=node_settings.nats_port,
        gateway_port=node_settings.gateway_port,
        fileserver_port=node_settings.fileserver_port or 0,
        fileserver_bind=read_settings(FileserverSettings, settings, environ).bind or bind,
        stage_ports=stage_ports(node_settings) if node_settings.stage_port else [],
        chosen={key: port for key in ("nats_port", "gateway_port") if (port := chosen_port(settings, key))},
        services=services,
        commands=_commands(settings),
        hub=str(node_values.get("hub") or ("" if environ.get("HF_ENDPOINT") else node_settings.hub)),
        changes={
            **by_section(StorageSettings, _changes(options, environ, settings)),
            **_kept_by_section(node_values, joins, bool(cluster_servers(settings))),
        },
        ready_deadline_s=options.ready_deadline_s,
    )


def _without_given(node_values: Mapping[str, Value], environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without what the command line says too: an option wins."""
    variables = {s.variable for s in settings_of(NodeSettings) if s.key in node_values}
    return {k: v for k, v in environ.items() if k not in variables}


def _bind_source(node_values: Mapping[str, Value], environ: Mapping[str, str]) -> str:
    if "bind" in node_values:
        return "give another one with --bind"
    if environ.get("SHOAL_BIND"):
        return "SHOAL_BIND names it: change or remove that"
    return "node.toml keeps it: give another one with --bind (default: forget it)"


def _kept_by_section(
    node_values: Mapping[str, Value], joins: list[str], has_joined: bool
) -> dict[str, dict[str, Value]]:
    """Return what to keep, by section of node.toml: a joined cluster's servers are in the one that `join` writes."""
    kept = {key: None if value == [] else value for key, value in node_values.items()}
    sections: dict[str, dict[str, Value]] = {}
    if kept.get("nats"):
        kept["nats"] = list(joins)
    if "nats" in kept and has_joined:
        if not kept["nats"]:
            raise Refused("this node has joined a cluster, whose NATS it uses: leave it first with `shoal leave`")
        sections[CLUSTER_SECTION] = {"nats": kept.pop("nats")}
    if kept:
        sections[NodeSettings.section] = kept
    return sections


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


def _nats_servers(
    node_values: Mapping[str, Value], node: NodeSettings, environ: Mapping[str, str], settings: Mapping[str, Any]
) -> list[str]:
    in_file = saved_servers(settings)
    if not isinstance(in_file, list) or not all(isinstance(u, str) for u in in_file):
        raise BadInput('`nats` in node.toml must be a list of URLs: nats = ["nats://host:4222"]')
    is_given = "nats" in node_values or environ.get("SHOAL_NATS")
    return [check_nats_url(u) for u in (node.nats if is_given else in_file)]


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
