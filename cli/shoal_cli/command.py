"""Carries out one command line. Every failure is one line on stderr and the exit code of its error."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from shoal_cli import instances
from shoal_cli.call import Call, print_json, read_as, shown
from shoal_cli.client import disks, events, logs
from shoal_cli.client.answers import Anything, StatusAnswer
from shoal_cli.client.conversation import Sampling
from shoal_cli.client.hub import as_exports, hub_settings
from shoal_cli.client.pull import Pull, display, say_it_goes_on
from shoal_cli.client.repair import repair
from shoal_cli.client.run import Run
from shoal_cli.client.tables import fits_table, models_table, status_page
from shoal_cli.client.transfers import control, transfer
from shoal_cli.client.typed import TypedLines
from shoal_cli.denied import not_allowed
from shoal_cli.node import down as stopping
from shoal_cli.node.decide import why_not_up
from shoal_cli.node.plan import UpOptions
from shoal_cli.node.up import up
from shoal_cli.parser import parse
from shoal_cli.sizes import parse_limit
from shoal_common import VERSION
from shoal_common.errors import BadInput, Denied, NotFound, ShoalError, Unavailable
from shoal_common.messages.questions import Fits
from shoal_common.names import ModelRef, check_node

_INTERRUPTED = 130


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
        return print_json(answer)
    call.out.print(status_page(read_as(answer, StatusAnswer)))
    return 0


def _doctor(call: Call) -> int:
    # Here and not above: it brings the client of NATS, whose import every other command would wait for.
    from shoal_cli.doctor import page  # noqa: PLC0415
    from shoal_cli.doctor.examine import examine  # noqa: PLC0415
    from shoal_cli.doctor.finding import exit_code  # noqa: PLC0415

    report = examine(call.home, call.environ)
    if call.args.as_json:
        print_json(page.as_json(report, VERSION))
    else:
        page.show(report, call.out)
    return exit_code(report.findings)


def _pull(call: Call) -> int:
    pull = Pull(call.gateway, call.args.model)
    pull.ask([check_node(n) for n in call.args.nodes], call.args.everywhere)
    if call.args.no_wait:
        if call.args.as_json:
            return print_json(pull.final())
        call.say(f"asked {', '.join(pull.nodes)} for {pull.model}; `shoal status` shows how it goes")
        return 0
    try:
        with display(call.out, call.args.as_json) as shown:
            pull.follow(shown)
    except KeyboardInterrupt:
        say_it_goes_on(pull.model)
        return _INTERRUPTED
    if call.args.as_json:
        print_json(pull.final())
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
        return shown(call, call.gateway.get("/v1/placements/fits", Fits), fits_table)
    answer = call.gateway.get("/v1/status", Anything)
    if call.args.as_json:
        return print_json({"models": answer.get("models", [])})
    models = read_as(answer, StatusAnswer).models
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
        print_json(said.answer)
        return said.exit_code
    if said.table is not None:
        call.out.print(said.table)
    for line in said.words:
        call.say(line)
    return said.exit_code


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
        return print_json(settings)
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
    "place": instances.place,
    "rebalance": instances.rebalance,
    "ps": instances.ps,
    "node": instances.node,
    "stop": instances.stop,
    "run": _run,
    "hub": _hub,
    "logs": _logs,
    "events": _events,
    "demo": _demo,
    "version": _version,
}
