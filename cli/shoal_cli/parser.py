"""The command line: what may be typed, its help, and a hint where a command was misspelt."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import NoReturn, Protocol

from shoal_cli.client.logs import NAMES
from shoal_cli.node.plan import GATEWAY_PORT, NATS_PORT, READY_DEADLINE_S
from shoal_common.errors import BadInput
from shoal_common.subjects import SERVICES

_EXAMPLES = """examples:
  shoal up                                        run a node here; Ctrl-C stops it
  shoal up -d --max-storage 200GB                 in the background, with 200 GB for models at most
  shoal up --bind 0.0.0.0                         let other machines join; prints what to type there
  shoal pull mlx-community/Qwen3-0.6B-4bit --all  bring a model to every node
  shoal run mlx-community/Qwen3-0.6B-4bit         talk to it
  shoal run mlx-community/Qwen3-0.6B-4bit "Why do fish swim in shoals?"
  shoal status                                    nodes, disks, models, instances
  shoal doctor                                    what is wrong here, and what to do about it
  shoal storage set --max-storage 200GB --eviction-policy lru --all

environment:
  SHOAL_HOME      the node's directory (~/.shoal)     SHOAL_NATS    NATS servers to join, comma-separated
  SHOAL_GATEWAY   address of a gateway elsewhere      SHOAL_SECRET  the cluster's secret
  SHOAL_DEBUG=1   show traces of failures

exit codes:
  0 done   2 not understood   3 not found   4 refused   5 away or busy: try again
  6 credential missing   7 deadline passed   8 corrupt   9 already running
  10 another version   1 anything else   130 Ctrl-C
"""

_JSON = {
    "status": """--json prints GET /v1/status of the gateway as it is: {"node", "version",
"nats_connected", "nodes": [{"node", "live", "services": {name: {"version", "pid", "host", "uptime_s", "addresses"}},
"missing_services", "other_versions": {service: version},
"link", "memory_total_bytes", "memory_available_bytes", "storage": {…} or null}], "models": […],
"downloads": […], "instances": […]}. Fields are only ever added.""",
    "doctor": """It changes nothing, works while NATS or the node is down, and looks from this machine: run it on both
when two nodes do not reach each other. Exit code 0 when nothing is a problem, else 1.
--json prints {"home", "node", "version", "worst", "findings": [{"check", "level", "what", "remedy", "about"}]}; a
level is "ok", "skipped" (it could not be looked at; another finding says why), "warning" or "problem". Fields are
only ever added.""",
    "pull": """--json prints nothing until the download has ended on every node, then {"downloads": [{"node", "model",
"phase", "commit", "total_bytes", "done_bytes", "verified_bytes", "resumed_bytes", "sources": {source: bytes},
"source_speeds": {source: bytes per second}, "eta_s", "switched": {source: times}, "error", …}], "commands":
{node: id}}. The exit code is that of the first node that failed. Fields are only ever added.""",
    "models": """As `shoal ls`; see there for what --json prints.""",
    "ls": """With --fits --json prints {"models": [{"model", "size_bytes", "tier": "fits", "tight", "force" or "",
"preview": as `shoal place --preview` has it, or null, "why"}]}. Without,
--json prints {"models": [{"model", "repo", "commit", "nodes": [node], "size_bytes",
"adopted_from": {node: directory of a read-only root}}]}. Fields are only ever added.""",
    "storage": """--json prints the API's answer: show {"node", "nodes": [{"node", "live", "disk_free_bytes",
"storage": {…} or null}]}; set {"nodes": {node: {"max_storage_bytes", "eviction_policy", "headroom_bytes",
"partial_retention_s", "read_only_roots", "roots", the limits of `shoal transfer`, "used_bytes", "from_environment",
"note"}}}; plan {"nodes": {node:
{"need_bytes", "garbage", "garbage_bytes", "unfinished" and "victims": [{"model", "frees_bytes", "last_use_s"}],
"frees_bytes", "enough", "evictable_bytes", "kept"}}}; pin and unpin {"nodes": {node: {"models", "pinned"}}}. Fields
are only ever added.""",
    "transfer": """--json prints the API's answer: show {"node", "nodes": [{"node", "live", "storage": {…,
"max_upload_bytes_per_s", "max_hub_bytes_per_s", "max_peer_bytes_per_s", "from_environment"} or null}]}; set what
`shoal storage set --json` prints. RATE is bytes per second: 20MB, 500kB, none. Fields are only ever added.""",
    "pause": """--json prints {"model", "nodes": {node: {"models": {model: "paused", "was_paused", "unknown", or the
phase it has ended with}}}}. Fields are only ever added.""",
    "resume": """--json prints {"model", "nodes": {node: {"models": {model: "resumed", "under_way", "unknown", or the
phase it has ended with}}}}. Fields are only ever added.""",
    "cancel": """--json prints {"model", "nodes": {node: {"cancelled", "was"}}}. Fields are only ever added.""",
    "place": """--json prints the instance as GET /v1/instances/{id} has it; with --preview what GET
/v1/placements/preview answers: {"model", "context_tokens", "estimated", "previews": [{"layout", "tier",
"is_low_memory", "stages": [{"node", "first_layer", "last_layer", "needed_bytes", "available_bytes", "tight_bytes",
"total_bytes", "freeing_bytes", "link_s", "link_measured"}], "tokens_per_s", "first_token_s", "fetch_bytes"}]}. Fields
are only ever added.""",
    "gc": """--json prints {"nodes": {node: {"freed_bytes", "blobs"}}}. Fields are only ever added.""",
    "verify": """--json prints {"nodes": {node: {"checked", "checked_bytes", "corrupt": [blob], "bad_leaves",
"missing": [blob], "models": [no longer whole], "instances": [of those models], "broken": [models]}}}. The exit code
is 8 when anything is corrupt or missing. Fields are only ever added.""",
    "repair": """--json prints what `shoal verify --json` does, and for each node "repaired": [models],
"fetched_bytes" and "errors": {model: {"code", "message"}}. The exit code is that of the first model that could not be
repaired. Fields are only ever added.""",
    "ps": """--json prints {"instances": [{"id", "model", "repo", "commit", "phase", "nodes", "stages": [{"rank",
"node", "first_layer", "last_layer", "phase", …}], "error"}]}. Fields are only ever added.""",
    "events": """--json prints a line of JSON for each event: {"sequence", "service", "node", "event", "at_s",
"fields": {…}}; and {"notice": "lost" or "anew", "cursor", "message", …} where the log could not go on from where it
was. Fields are only ever added; docs/protocol.md lists the events.""",
    "hub": """For a shell: eval "$(shoal hub)", then `hf download org/name` and all that uses huggingface_hub reads
from the cluster. --json prints {"HF_ENDPOINT", "HF_TOKEN" where the cluster has a secret}.""",
}


_POLICIES = ("manual", "lru")


class _Add(Protocol):
    def __call__(
        self, name: str, text: str, parent: Parser = ..., as_json: bool = ..., where: Parser | None = ...
    ) -> Parser: ...


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are ours: one line, and where the help is."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing usage."""
        raise BadInput(f"{message}; see `{self.prog} --help`")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Understand a command line. Raises BadInput; `--help` exits by SystemExit."""
    parser, names = _build()
    first = next((a for a in _without_globals(arguments) if not a.startswith("-")), None)
    if first is not None and first not in names:
        close = difflib.get_close_matches(first, names, n=1)
        hint = f"did you mean `shoal {close[0]}`?" if close else "see `shoal --help` for those there are"
        raise BadInput(f"there is no command {first[:40]!r}: {hint}")
    # What follows `demo` is the demo's own.
    if first == "demo":
        at = list(arguments).index("demo")
        parsed = parser.parse_args(arguments[: at + 1])
        parsed.rest = list(arguments[at + 1 :])
        return parsed
    parsed = parser.parse_args(arguments)
    if parsed.command is None:
        parser.print_help()
        raise SystemExit(0)
    return parsed


def _without_globals(arguments: Sequence[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for a in arguments:
        if skip:
            skip = False
        elif a in ("--home", "--gateway"):
            skip = True
        else:
            kept.append(a)
    return kept


def _build() -> tuple[Parser, list[str]]:
    common = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--home", metavar="DIR", help="the node's directory (SHOAL_HOME, else ~/.shoal)")
    remote = Parser(add_help=False, argument_default=argparse.SUPPRESS, parents=[common])
    remote.add_argument("--gateway", metavar="URL", help="a gateway elsewhere (SHOAL_GATEWAY)")

    parser = Parser(
        prog="shoal",
        description="Run large language models across the machines you have.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[remote],
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

    def add(
        name: str, text: str, parent: Parser = remote, as_json: bool = False, where: Parser | None = None
    ) -> Parser:
        sub = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            parents=[parent, where] if where else [parent],
            epilog=_JSON.get(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if as_json:
            sub.add_argument("--json", action="store_true", dest="as_json", help="for programs; described below")
        return sub

    _add_up(add("up", "run a node on this machine", common))
    add("down", "stop this machine's node", common)
    restart = add("restart", "restart one service of this machine's node", common)
    restart.add_argument(
        "service", metavar="SERVICE", choices=(*SERVICES, "nats"), help=", ".join((*SERVICES, "nats"))
    )
    add("status", "show nodes, disks, models, downloads and instances", as_json=True)
    add("doctor", "say what is wrong with this node and its cluster, and what to do about it", common, as_json=True)
    _add_models(add)
    _add_disks(add, remote)
    _add_instances(add, remote)
    logs = add("logs", "show the logs of this machine's node", common)
    logs.add_argument(
        "service", metavar="SERVICE", nargs="?", default="", choices=("", *NAMES), help=", ".join(NAMES)
    )
    logs.add_argument("-f", "--follow", action="store_true", help="go on with what is written")
    logs.add_argument("-n", "--lines", type=int, default=100, metavar="N", help="this many lines (100)")
    _add_events(add)
    demo = commands.add_parser("demo", help="run the demo: a small cluster on this machine", add_help=False)
    demo.set_defaults(rest=[])
    add("version", "print the version", common)
    return parser, list(commands.choices)


def _add_up(up: Parser) -> None:
    up.add_argument(
        "--node", metavar="NAME", default="", help="the node's id at its first start (from the host name)"
    )
    up.add_argument(
        "--nats", metavar="URL", action="append", default=[], help="join the NATS server there instead of running one"
    )
    up.add_argument(
        "--nats-port",
        metavar="N",
        type=_port,
        default=NATS_PORT,
        help=f"port of our NATS ({NATS_PORT}); 0: a free one",
    )
    up.add_argument(
        "--bind", metavar="ADDR", default="", help="address to listen on (127.0.0.1); beyond it a secret is made"
    )
    up.add_argument(
        "--port",
        metavar="N",
        type=_port,
        default=GATEWAY_PORT,
        help=f"gateway's port ({GATEWAY_PORT}); 0: a free one",
    )
    up.add_argument(
        "--max-storage",
        metavar="SIZE",
        default="",
        help="most that models may take, like 200GB or 150GiB, or none; kept in node.toml",
    )
    up.add_argument(
        "--eviction-policy",
        choices=_POLICIES,
        default="",
        help="lru makes room for new models, manual refuses them (manual); kept in node.toml",
    )
    _read_only_roots(up)
    up.add_argument("--hub", metavar="URL", default="", help="a hub instead of huggingface.co (HF_ENDPOINT)")
    up.add_argument("-d", "--detach", action="store_true", help="return once the node is up; it goes on")
    up.add_argument(
        "--wait",
        metavar="S",
        type=float,
        default=READY_DEADLINE_S,
        help=f"seconds to be up in ({READY_DEADLINE_S:.0f})",
    )
    for service in SERVICES:
        up.add_argument(
            f"--no-{service}", dest="without", action="append_const", const=service, help=f"do not run {service}"
        )


def _add_events(add: _Add) -> None:
    events = add("events", "show what has happened in the cluster", as_json=True)
    events.add_argument("-f", "--follow", action="store_true", help="go on with what happens")
    begin = events.add_mutually_exclusive_group()
    begin.add_argument("-n", "--lines", type=_count, default=50, metavar="N", help="the last N events (50)")
    begin.add_argument("--since", metavar="SPAN", default="", help="all of the last so long, like 10m, 1h or 7d")
    events.add_argument("--service", choices=("", *SERVICES), default="", metavar="SERVICE", help="only of this one")
    events.add_argument("--node", metavar="N", default="", help="only of this node")
    events.add_argument("--event", metavar="E", default="", help="only this event, like model_ready")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a port: give 0 to 65535")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1_000_000_000:
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a count: give a whole number from 1")
    return int(text)


def _model(sub: Parser) -> None:
    sub.add_argument("model", metavar="MODEL", help="org/name, or org/name@revision")


def _add_models(add: _Add) -> None:
    pull = add("pull", "bring a model to a node", as_json=True)
    _model(pull)
    where = pull.add_mutually_exclusive_group()
    where.add_argument(
        "--node", metavar="N", action="append", dest="nodes", default=[], help="to this node; may be repeated"
    )
    where.add_argument("--all", action="store_true", dest="everywhere", help="to every live node")
    pull.add_argument("--no-wait", action="store_true", help="only ask; do not follow the download")
    for name, text in (
        ("pause", "stop a download and keep its bytes; only a person lets it go on"),
        ("resume", "let a paused download go on"),
        ("cancel", "withdraw a download that is under way or paused, partial bytes included"),
    ):
        sub = add(name, text, as_json=True)
        if name == "cancel":
            _model(sub)
        else:
            sub.add_argument("model", metavar="MODEL", nargs="?", default="", help="only this one; else all of them")
        on = sub.add_mutually_exclusive_group()
        on.add_argument(
            "--node", metavar="N", action="append", dest="nodes", default=[], help="on this node; may be repeated"
        )
        on.add_argument(
            "--all", action="store_true", dest="everywhere", help="on every live node; else where it is downloaded"
        )
    for name in ("ls", "models"):
        ls = add(name, "list the models that nodes hold", as_json=True)
        ls.add_argument(
            "--fits", action="store_true", help="and which of them could be placed now, the largest first"
        )
    rm = add("rm", "delete a model; deleting what is absent succeeds")
    _model(rm)
    rm.add_argument("--node", metavar="N", default="", help="on this node only; else on every one")
    rm.add_argument("--revision", metavar="R", default="", help="a branch, tag or commit, as after @")


def _add_disks(add: _Add, remote: Parser) -> None:
    where = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    which = where.add_mutually_exclusive_group()
    which.add_argument("--node", metavar="N", help="of this node (the gateway's own)")
    which.add_argument("--all", action="store_true", dest="everywhere", help="of every live node")
    where.add_argument("--json", action="store_true", dest="as_json", help="for programs: the API's answer")

    storage = add("storage", "show nodes' disks, and change their settings", where=where)
    actions = storage.add_subparsers(dest="action", metavar="ACTION", parser_class=Parser)
    transfer = add("transfer", "show how fast nodes may send and take weights, and change it", where=where)
    rates = transfer.add_subparsers(dest="action", metavar="ACTION", parser_class=Parser)

    def action(name: str, text: str, of: str = "storage") -> Parser:
        return {"storage": actions, "transfer": rates}[of].add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            parents=[remote, where],
            epilog=_JSON[of],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    action("show", "quota, use, policy and pins; what is done without an action")
    change = action("set", "change settings, in node.toml and at once; what is left out stays as it is")
    change.add_argument("--max-storage", metavar="SIZE", help="most that models may take, like 200GB, or none")
    change.add_argument(
        "--eviction-policy", choices=_POLICIES, help="lru makes room for new models, manual refuses them"
    )
    change.add_argument("--headroom", metavar="SIZE", help="what stays free on the disk, like 5GB")
    change.add_argument(
        "--partial-retention", metavar="SPAN", help="how long what ended downloads leave is kept, like 7d; 0: not"
    )
    _read_only_roots(change)
    for option, what in (
        ("add", "let models come to this directory on another disk too; may be repeated"),
        ("remove", "use it no more; what is there stays, and its models are not offered; may be repeated"),
    ):
        change.add_argument(f"--{option}-root", metavar="PATH", action="append", dest=f"{option}_roots", help=what)
    plan = action("plan", "what would be evicted to make room; nothing is")
    plan.add_argument("--need", metavar="SIZE", required=True, help="room for so much, like 50GB")
    _model(action("pin", "never evict or delete a model"))
    _model(action("unpin", "let a model be evicted and deleted again"))
    action("show", "the limits; what is done without an action", "transfer")
    limit = action("set", "change limits, in node.toml and at once; what is left out stays as it is", "transfer")
    limit.add_argument(
        "--max-upload", metavar="RATE", help="what the node sends to others in all, like 20MB, or none"
    )
    limit.add_argument("--max-hub", metavar="RATE", help="what it takes from the hub in all")
    limit.add_argument("--max-peer", metavar="RATE", help="what it takes from each other node")
    add("gc", "remove bytes that no model and no download needs", where=where)
    verify = add("verify", "hash what a node holds again, and set aside what is corrupt", where=where)
    verify.add_argument("model", metavar="MODEL", nargs="?", default="", help="only this one; else all of it")
    repair = add("repair", "verify, and fetch again what is bad, by leaf where that can be told", where=where)
    repair.add_argument("model", metavar="MODEL", nargs="?", default="", help="only this one; else all of it")


def _read_only_roots(to: Parser) -> None:
    roots = to.add_mutually_exclusive_group()
    roots.add_argument(
        "--read-only-root",
        metavar="PATH",
        action="append",
        dest="read_only_roots",
        help="offer the models of this directory as they are, like ~/.cache/huggingface/hub; never written; may be "
        "repeated, and replaces those set before; kept in node.toml",
    )
    roots.add_argument(
        "--no-read-only-roots", action="store_const", const=[], dest="read_only_roots", help="offer the store's only"
    )


def _add_instances(add: _Add, remote: Parser) -> None:
    place = add("place", "lay a model out over the nodes' memory and start it", as_json=True)
    _model(place)
    count = place.add_mutually_exclusive_group()
    count.add_argument("--nodes", metavar="N", type=_count, dest="exactly", help="over exactly this many nodes")
    count.add_argument("--min-nodes", metavar="N", type=_count, dest="at_least", help="over at least this many nodes")
    place.add_argument("--node", metavar="N", action="append", dest="nodes", default=[], help="only on these nodes")
    place.add_argument("--context", metavar="T", type=_count, default=0, help="tokens of context to keep room for")
    place.add_argument("--without", metavar="N", action="append", default=[], help="not on these nodes")
    place.add_argument(
        "--objective",
        choices=("latency", "throughput", "balanced"),
        default="latency",
        help="best for one answer at a time, for --in-flight of them, or for as many as it has stages",
    )
    place.add_argument("--in-flight", metavar="C", type=_count, default=0, help="answers at once (4)")
    place.add_argument("--layout", metavar="L", default="", help="exactly this one, as --preview names it: a:14,b:2")
    place.add_argument(
        "--allow-low-memory", action="store_true", help="also where other programs have to give memory back"
    )
    place.add_argument("--force", action="store_true", help="also without a reserve for the system")
    place.add_argument("--preview", action="store_true", help="show what could be chosen, and choose nothing")
    add("ps", "list the instances", as_json=True)
    add("stop", "stop an instance").add_argument("instance", metavar="INSTANCE", help="its id; `shoal ps` lists them")
    node = add("node", "look after the cluster's nodes")
    doing = node.add_subparsers(dest="action", metavar="ACTION", parser_class=Parser, required=True)
    forget = doing.add_parser(
        "forget",
        help="remove all that names a node which is gone for good",
        description="Remove all that names a node which is gone for good: downloads, instances, what it held. "
        "One that comes back says again what is on its disk.",
        parents=[remote],
    )
    forget.add_argument("node", metavar="NODE", help="its id; `shoal status` lists them")
    drain = doing.add_parser(
        "drain",
        help="let nothing run on a node any more",
        description="Place nothing on a node any more and move the instances that run there, as far as others have "
        "room. Its models stay and are served.",
        parents=[remote],
    )
    drain.add_argument("node", metavar="NODE", help="its id; `shoal status` lists them")
    drain.add_argument("--undo", action="store_true", help="let it work again")
    hub = add("hub", "print what lets huggingface_hub take models from the cluster", as_json=True)
    hub.add_argument("--node", metavar="N", default="", help="the node to ask for models (this one)")
    run = add("run", "talk to a model; brings and places it if need be")
    _model(run)
    run.add_argument("prompt", metavar="PROMPT", nargs="?", help="answer this and end; else what stdin holds")
    run.add_argument(
        "--nodes", metavar="N", type=_count, dest="exactly", help="place it over exactly this many nodes"
    )
    run.add_argument("--max-tokens", metavar="T", type=_count, default=2048, help="longest answer (2048)")
    run.add_argument("--temperature", metavar="X", type=_temperature, default=0.7, help="0 is greedy (0.7)")


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 2:
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a temperature: give 0 to 2")
    return value
