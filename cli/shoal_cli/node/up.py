"""`shoal up`: become the node's supervisor, in the foreground or behind a pipe that tells how starting went."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from select import select
from typing import TextIO, cast

import msgspec
from rich.console import Console

from shoal_cli.home import Home, RunLock
from shoal_cli.node.control import MAX_LINE_BYTES, Reply
from shoal_cli.node.leftovers import end_leftovers
from shoal_cli.node.plan import NodePlan, UpOptions, make_plan
from shoal_cli.node.report import UpReport, not_up_error, show
from shoal_cli.node.rotate import LogStream, RotatingLog, tail
from shoal_cli.node.supervisor import Supervisor
from shoal_common import logs
from shoal_common.config import ensure_node_id, read_settings
from shoal_common.errors import BadInput, Failed, from_body
from shoal_common.logs import Log
from shoal_common.messages import decode
from shoal_common.settings_file import change_settings

log = Log("supervisor")

_BACKGROUND_MARGIN_S = 60.0
"""Beyond the readiness deadline: ending leftovers and starting NATS come before it."""


def up(options: UpOptions, environ: Mapping[str, str], detach: bool) -> int:
    """Run a node. Returns the exit code, when it ends or, detached, once it is up."""
    out, err = Console(highlight=False), Console(stderr=True, highlight=False)
    if detach:
        return _in_background(options, environ, out, err)
    waiting = out.status(f"starting the node in {options.home}") if out.is_terminal else None
    if waiting:
        waiting.start()

    def when_up(report: UpReport) -> None:
        if waiting:
            waiting.stop()
        show(report, out, err, detached=False)

    def news(line: str) -> None:
        err.print(f"  {time.strftime('%H:%M:%S')} {line}", markup=False, soft_wrap=True)

    try:
        run_node(options, environ, when_up, news)
    finally:
        if waiting:
            waiting.stop()
    return 0


def run_node(
    options: UpOptions, environ: Mapping[str, str], when_up: Callable[[UpReport], None], news: Callable[[str], None]
) -> None:
    """Supervise until told to stop. Raises ShoalError when the node cannot start."""
    home = Home(Path(options.home))
    lock = RunLock(home)
    lock.take()
    try:
        plan = _plan(options, environ, home)
        stream = LogStream(RotatingLog(home.log("supervisor")))
        # `logging` needs nothing of a stream but write and flush.
        logs.set_up("supervisor", plan.node, environ.get("SHOAL_LOG") or "info", cast(TextIO, stream))
        for pid in end_leftovers(home):
            log.warning("ended a process that a killed supervisor had left", pid=pid)
        if plan.storage:
            # Into the file, not the environment: it holds after a restart too, and `shoal storage set` may change it.
            change_settings(home.root, {"storage": plan.storage}, lambda _: None)
        asyncio.run(_supervise(home, plan, environ, when_up, news))
    finally:
        # The lock is kept: it is free when this process has ended, which is what `shoal down` waits for.
        home.forget_run()


def _plan(options: UpOptions, environ: Mapping[str, str], home: Home) -> NodePlan:
    settings = read_settings(home.root)
    node = ensure_node_id(home.root, options.node or None)
    if options.node and node != options.node:
        raise BadInput(
            f"the node in {home.root} is called {node} and keeps that name (I8): leave --node out, or choose another "
            "--home for a new node"
        )
    kept = home.read_secret()
    plan = make_plan(options, environ, settings, node, kept)
    if plan.needs_secret:
        return msgspec.structs.replace(plan, secret=home.ensure_secret())
    if plan.secret and plan.secret != kept:
        home.keep_secret(plan.secret)
    return plan


async def _supervise(
    home: Home,
    plan: NodePlan,
    environ: Mapping[str, str],
    when_up: Callable[[UpReport], None],
    news: Callable[[str], None],
) -> None:
    try:
        await Supervisor(home, plan, environ, news).run(when_up)
    except BaseExceptionGroup as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from group


def _in_background(options: UpOptions, environ: Mapping[str, str], out: Console, err: Console) -> int:
    """Start a process of its own session and wait until it says how starting went.

    The options go through its stdin, not its arguments: a NATS URL may hold a secret, and anybody may read those.
    """
    home = Home(Path(options.home))
    home.make()
    with home.log("supervisor").open("ab") as last_words:
        process = subprocess.Popen(
            [sys.executable, "-m", "shoal_cli.node.background", options.home],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=last_words,
            env=dict(environ),
            start_new_session=True,
        )
    assert process.stdin is not None and process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.write(msgspec.json.encode(options))
        process.stdin.close()
    readable, _, _ = select([process.stdout], [], [], options.ready_deadline_s + _BACKGROUND_MARGIN_S)
    line = process.stdout.readline(MAX_LINE_BYTES) if readable else b""
    if not line:
        last = tail(home.log("supervisor"), 1)
        raise Failed(
            f"the supervisor (pid {process.pid}) did not say that the node is up; its log, "
            f"{home.log('supervisor')}, ends with: {last[0] if last else 'nothing'}"
        )
    reply = decode(line, Reply)
    if reply.error is not None:
        process.wait()
        raise from_body(reply.error)
    report = decode(bytes(reply.result), UpReport)
    show(report, out, err, detached=True)
    if report.not_up:
        raise not_up_error(report)
    return 0


def hand_over(reply: Reply) -> None:
    """In the background process: tell the waiting `shoal up -d`, and let go of its pipe."""
    with suppress(OSError):
        os.write(1, msgspec.json.encode(reply) + b"\n")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    os.close(nowhere)
