"""Carries out one command line. Every failure is one line on stderr and the exit code of its error."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from rich.console import Console, RenderableType

from shoal_cli.client import disks, events, logs
from shoal_cli.client.answers import Anything, InstanceRow, MovedRow, StatusAnswer
from shoal_cli.client.conversation import Sampling
from shoal_cli.client.gateway import Gateway, find_gateway
from shoal_cli.client.hub import as_exports, hub_settings
from shoal_cli.client.placing import as_query, finer, place, until_ready, wish
from shoal_cli.client.pull import Pull, display, say_it_goes_on
from shoal_cli.client.repair import repair
from shoal_cli.client.run import Run
from shoal_cli.client.tables import (
    fits_table,
    instances_table,
    models_table,
    previews_table,
    rebalances_table,
    status_page,
)
from shoal_cli.client.transfers import control, transfer
from shoal_cli.client.typed import TypedLines, confirmed
from shoal_cli.denied import not_allowed
from shoal_cli.home import Home
from shoal_cli.node import down as stopping
from shoal_cli.node.decide import why_not_up
from shoal_cli.node.plan import UpOptions
from shoal_cli.node.up import up
from shoal_cli.parser import parse
from shoal_cli.sizes import parse_limit
from shoal_common import VERSION
from shoal_common.config import home_directory
from shoal_common.errors import BadInput, Denied, NotFound, ShoalError, Unavailable
from shoal_common.messages.questions import Fits, Previews, Rebalances
from shoal_common.names import ModelRef, check_id, check_node

T = TypeVar("T")

_INTERRUPTED = 130


class Call:
    """What every command works with."""

    def __init__(self, args: argparse.Namespace, environ: Mapping[str, str]) -> None:
        self.args, self.environ = args, environ
        stated = getattr(args, "home", "")
        self.home = Home(Path(stated).expanduser().absolute() if stated else home_directory(environ))
        self.out = Console(highlight=False)
        self.err = Console(stderr=True, highlight=False)

    @property
    def gateway(self) -> Gateway:
        """The gateway this command is for."""
        return find_gateway(getattr(self.args, "gateway", ""), self.home, self.environ)

    def say(self, words: str) -> None:
        """One line for a person, on stdout."""
        self.out.print(words, markup=False, soft_wrap=True)


def run(arguments: Sequence[str]) -> int:
    """Carry out a command line. Returns the exit code."""
    environ = dict(os.environ)
    try:
        args = parse(arguments)
        return _COMMANDS[args.command](Call(args, environ))
    except ShoalError as e:
        return _fail(e, e.message, e.exit_code, environ)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python must not complain about it while it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except PermissionError as e:
        return _fail(e, not_allowed(e), Denied.exit_code, environ)
    except Exception as e:  # noqa: BLE001  # people get a line, never a trace; SHOAL_DEBUG has it
        return _fail(e, f"{type(e).__name__}: {e}; SHOAL_DEBUG=1 shows where", 1, environ)


def _fail(error: BaseException, message: str, code: int, environ: Mapping[str, str]) -> int:
    if environ.get("SHOAL_DEBUG"):
        raise error
    print(f"shoal: {' '.join(message.split())}", file=sys.stderr)
    return code


def _print_json(value: object) -> int:
    print(json.dumps(value, indent=2, ensure_ascii=False))
    return 0


def _shown(call: Call, answer: T, table: Callable[[T], RenderableType]) -> int:
    """An answer as it is, for programs, or as a table."""
    if call.args.as_json:
        return _print_json(msgspec.to_builtins(answer))
    call.out.print(table(answer))
    return 0


def _up(call: Call) -> int:
    args = call.args
    options = UpOptions(
        home=str(call.home.root),
        node=check_node(args.node) if args.node else "",
        nats=args.nats,
        nats_port=args.nats_port,
        bind=args.bind,
        port=args.port,
        max_storage_bytes=parse_limit(args.max_storage) if args.max_storage else msgspec.UNSET,
        eviction_policy=args.eviction_policy or msgspec.UNSET,
        read_only_roots=msgspec.UNSET
        if args.read_only_roots is None
        else [r if r.startswith("~") else str(Path(r).absolute()) for r in args.read_only_roots],
        hub=args.hub,
        without=args.without or [],
        ready_deadline_s=args.wait,
    )
    return up(options, call.environ, args.detach)


def _down(call: Call) -> int:
    ended = stopping.down(call.home)
    if ended.was_running:
        call.say(f"stopped the node in {call.home.root} (supervisor pid {ended.pid})")
    elif not ended.leftovers:
        call.say(f"no node is running in {call.home.root}")
    if ended.leftovers:
        pids = ", ".join(map(str, ended.leftovers))
        call.say(f"ended what a killed supervisor had left: pid {pids}")
    return 0


def _restart(call: Call) -> int:
    now = stopping.restart(call.home, call.args.service)
    call.say(f"{now.name} is back, pid {now.pid}")
    return 0


def _status(call: Call) -> int:
    try:
        answer = call.gateway.get("/v1/status", Anything)
    except Unavailable:
        here = stopping.supervisor_status(call.home)
        if here is None:
            raise
        # The supervisor is there and its gateway is not: say which of its children is the trouble.
        wrong = [f"{c.name} ({why_not_up(c)})" for c in here.children if c.phase != "ready"]
        raise Unavailable(
            f"node {here.node} runs (supervisor pid {here.pid}), and its gateway does not answer; not ready: "
            f"{', '.join(wrong) or 'nothing'}; see `shoal logs`"
        ) from None
    if call.args.as_json:
        return _print_json(answer)
    call.out.print(status_page(_as(answer, StatusAnswer)))
    return 0


def _doctor(call: Call) -> int:
    # Here and not above: it brings the client of NATS, whose import every other command would wait for.
    from shoal_cli.doctor import page  # noqa: PLC0415
    from shoal_cli.doctor.examine import examine  # noqa: PLC0415
    from shoal_cli.doctor.finding import exit_code  # noqa: PLC0415

    report = examine(call.home, call.environ)
    if call.args.as_json:
        _print_json(page.as_json(report, VERSION))
    else:
        page.show(report, call.out)
    return exit_code(report.findings)


def _as(answer: Anything, kind: type[Any]) -> Any:
    return msgspec.convert(answer, kind)


def _pull(call: Call) -> int:
    pull = Pull(call.gateway, call.args.model)
    pull.ask([check_node(n) for n in call.args.nodes], call.args.everywhere)
    if call.args.no_wait:
        if call.args.as_json:
            return _print_json(pull.final())
        call.say(f"asked {', '.join(pull.nodes)} for {pull.model}; `shoal status` shows how it goes")
        return 0
    try:
        with display(call.out, call.args.as_json) as shown:
            pull.follow(shown)
    except KeyboardInterrupt:
        say_it_goes_on(pull.model)
        return _INTERRUPTED
    if call.args.as_json:
        _print_json(pull.final())
    for node, error in list(pull.errors.items())[1:]:
        print(f"shoal: {node}: {error.message}", file=sys.stderr)
    for node, error in pull.errors.items():
        raise type(error)(f"{node}: {error.message}", **error.details)
    if not call.args.as_json:
        call.say(f"{pull.model} is ready on {', '.join(pull.nodes)}")
    return 0


def _control(verb: str) -> Callable[[Call], int]:
    return lambda call: _said(call, control(call.gateway, verb, call.args))


def _transfer(call: Call) -> int:
    return _said(call, transfer(call.gateway, call.args))


def _ls(call: Call) -> int:
    if call.args.fits:
        return _shown(call, call.gateway.get("/v1/placements/fits", Fits), fits_table)
    answer = call.gateway.get("/v1/status", Anything)
    if call.args.as_json:
        return _print_json({"models": answer.get("models", [])})
    models = _as(answer, StatusAnswer).models
    if models:
        call.out.print(models_table(models), crop=False)
    else:
        call.say("no node holds a model yet: `shoal pull org/name` brings one here")
    return 0


def _rm(call: Call) -> int:
    ref = ModelRef.parse(call.args.model)
    query = {"node": check_node(call.args.node)} if call.args.node else {}
    if call.args.revision and "@" in call.args.model:
        raise BadInput("the revision is given twice: after @ and with --revision")
    if call.args.revision:
        ref = ModelRef.parse(f"{ref.repo}@{call.args.revision}")
    if "@" in str(ref):
        query["revision"] = ref.revision
    answer = call.gateway.delete(f"/v1/models/{ref.repo}", Anything, **query)
    nodes = answer.get("nodes", {})
    if answer.get("deleted", bool(nodes)):
        call.say(f"deleted {ref} on {', '.join(nodes)}")
    else:
        call.say(f"{ref} is on no node" if not call.args.node else f"{ref} is not on {call.args.node}")
    return 0


def _storage(call: Call) -> int:
    return _said(call, disks.storage(call.gateway, call.args))


def _gc(call: Call) -> int:
    return _said(call, disks.collect_garbage(call.gateway, call.args))


def _verify(call: Call) -> int:
    return _said(call, disks.verify(call.gateway, call.args))


def _repair(call: Call) -> int:
    as_json = getattr(call.args, "as_json", False)
    say: Callable[[str], None] = (lambda _: None) if as_json else call.say
    try:
        with display(call.out, as_json) as shown:
            said = repair(call.gateway, call.args, shown, say)
    except KeyboardInterrupt:
        print("\nwhat was asked for goes on without you: `shoal status` shows it", file=sys.stderr)
        return _INTERRUPTED
    return _said(call, said)


def _said(call: Call, said: disks.Said) -> int:
    if getattr(call.args, "as_json", False):
        _print_json(said.answer)
        return said.exit_code
    if said.table is not None:
        call.out.print(said.table)
    for line in said.words:
        call.say(line)
    return said.exit_code


def _place(call: Call) -> int:
    a = call.args
    body = wish(a.model, a.exactly, a.at_least, [check_node(n) for n in a.nodes], a.context) | finer(a)
    if a.preview:
        return _shown(call, call.gateway.get("/v1/placements/preview", Previews, **as_query(body)), previews_table)
    ask = confirmed if sys.stdin is not None and sys.stdin.isatty() and not a.as_json else None
    instance: InstanceRow = place(call.gateway, body, lambda words: print(words, file=sys.stderr), ask)
    if a.as_json:
        return _print_json(msgspec.to_builtins(instance))
    call.say(f"instance {instance.id} is ready on {', '.join(instance.nodes)}")
    return 0


def _ps(call: Call) -> int:
    answer = call.gateway.get("/v1/instances", Anything)
    if call.args.as_json:
        return _print_json({"instances": answer.get("instances", [])})
    rows = [_as(i, InstanceRow) for i in answer.get("instances", [])]
    if rows:
        call.out.print(instances_table(rows))
    else:
        call.say("nothing is running: `shoal run org/name` starts a model")
    return 0


def _stop(call: Call) -> int:
    instance = check_id(call.args.instance)
    answer = call.gateway.delete(f"/v1/instances/{instance}", Anything)
    call.say(f"stopped {instance}" if answer.get("deleted", True) else f"{instance} was not running")
    return 0


def _rebalance(call: Call) -> int:
    if not call.args.instance:
        if call.args.layout:
            raise BadInput("which instance? `shoal rebalance INSTANCE --layout L`")
        return _shown(call, call.gateway.get("/v1/placements/rebalances", Rebalances), rebalances_table)
    path = f"/v1/instances/{check_id(call.args.instance)}/rebalance"
    instance = call.gateway.post(path, {"layout": call.args.layout}, MovedRow)
    if instance.moved:
        until_ready(call.gateway, instance, lambda words: print(words, file=sys.stderr))
    if call.args.as_json:
        return _print_json(msgspec.to_builtins(instance))
    nodes = ", ".join(instance.nodes)
    call.say(f"instance {instance.id} is ready on {nodes}" if instance.moved else f"{instance.id} stays on {nodes}")
    return 0


def _node(call: Call) -> int:
    node = check_node(call.args.node)
    if call.args.action == "drain":
        return _drain(call, node)
    answer = call.gateway.delete(f"/v1/nodes/{node}", Anything)
    count = answer.get("key_count", 0)
    keys = f"{count} {'key' if count == 1 else 'keys'}"
    call.say(f"forgot {node}: {keys} removed" if answer.get("found") else f"nothing names {node}")
    return 0


def _drain(call: Call, node: str) -> int:
    if call.args.undo:
        answer = call.gateway.delete(f"/v1/nodes/{node}/drain", Anything)
        call.say(f"{node} may work again" if answer.get("was_drained") else f"{node} was not drained")
        return 0
    answer = call.gateway.post(f"/v1/nodes/{node}/drain", {}, Anything)
    staying = ", ".join(answer.get("instances", []))
    call.say(
        f"drained {node}" + (f"; {staying} will move as far as other nodes have room: `shoal ps`" if staying else "")
    )
    return 0


def _run(call: Call) -> int:
    a = call.args
    session = Run(call.gateway, a.model, a.exactly, Sampling(a.max_tokens, a.temperature), call.err)
    if a.prompt is not None:
        return session.once(a.prompt)
    if sys.stdin is not None and sys.stdin.isatty():
        return session.interactively(TypedLines(call.home.chat_history))
    prompt = sys.stdin.read().strip() if sys.stdin is not None else ""
    if not prompt:
        raise BadInput("stdin holds no prompt: write one, or give it after the model")
    return session.once(prompt)


def _hub(call: Call) -> int:
    status = call.gateway.get("/v1/status", StatusAnswer)
    node = check_node(call.args.node) if call.args.node else ""
    settings = hub_settings(status, node, call.environ.get("SHOAL_SECRET") or call.home.read_secret())
    if call.args.as_json:
        return _print_json(settings)
    for line in as_exports(settings):
        print(line)
    return 0


def _logs(call: Call) -> int:
    for text in logs.last_lines(call.home, call.args.service, max(call.args.lines, 0)):
        print(text)
    if call.args.follow:
        with contextlib.suppress(KeyboardInterrupt):
            for text in logs.follow(call.home, call.args.service):
                print(text, flush=True)
    return 0


def _events(call: Call) -> int:
    with contextlib.suppress(KeyboardInterrupt) if call.args.follow else contextlib.nullcontext():
        events.tell(lambda: call.gateway, call.args)
    return 0


def _demo(call: Call) -> int:
    if importlib.util.find_spec("shoal_demo") is None or importlib.util.find_spec("shoal_demo.__main__") is None:
        raise NotFound(
            "the demo is not installed: it is the directory `demo` of Shoal's repository; `make` installs it"
        )
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "shoal_demo", *call.args.rest])


def _version(call: Call) -> int:
    call.say(f"shoal {VERSION}")
    return 0


_COMMANDS: dict[str, Callable[[Call], int]] = {
    "up": _up,
    "down": _down,
    "restart": _restart,
    "status": _status,
    "doctor": _doctor,
    "pull": _pull,
    "pause": _control("pause"),
    "resume": _control("resume"),
    "cancel": _control("cancel"),
    "ls": _ls,
    "models": _ls,
    "rm": _rm,
    "storage": _storage,
    "transfer": _transfer,
    "gc": _gc,
    "verify": _verify,
    "repair": _repair,
    "place": _place,
    "rebalance": _rebalance,
    "ps": _ps,
    "node": _node,
    "stop": _stop,
    "run": _run,
    "hub": _hub,
    "logs": _logs,
    "events": _events,
    "demo": _demo,
    "version": _version,
}
