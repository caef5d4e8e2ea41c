"""Becoming the node's supervisor, in the foreground or in a background process that reports through a pipe."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from select import select
from typing import TextIO, cast

import msgspec
from rich.console import Console

from shoal_cli.membership.operator_files import OperatorFiles
from shoal_cli.node.children.orphans import kill_orphans, refuse_copy
from shoal_cli.node.control import MAX_LINE_BYTES, ControlReply
from shoal_cli.node.home_disk import disk_errors_named, free_ballasts
from shoal_cli.node.logs.log_rotation import LogStream, RotatingLog, tail
from shoal_cli.node.node_plan import NodePlan, UpOptions, make_plan
from shoal_cli.node.ports import with_free_ports
from shoal_cli.node.startup_report import StartupReport, print_report, startup_error
from shoal_cli.node.supervisor import Supervisor
from shoal_cli.node_home import Home, RunLock
from shoal_common import logs
from shoal_common.config import ensure_node_id, read_settings_file, saved_node_id
from shoal_common.errors import BadInput, InternalError, Refused, from_body
from shoal_common.host.file_kinds import wrong_kinds_named
from shoal_common.host.own_process import file_limit_problem, python_environment, set_up_process
from shoal_common.host.private_files import open_private
from shoal_common.identity.node_identity import NodeIdentity
from shoal_common.logs import StructuredLogger
from shoal_common.messages import decode
from shoal_common.redaction import remember_secrets
from shoal_common.settings_file import change_settings

log = StructuredLogger("supervisor")

_BACKGROUND_MARGIN_S = 60.0
"""Beyond the readiness deadline: ending orphans and starting NATS come before it."""


def up(options: UpOptions, environ: Mapping[str, str], detach: bool) -> int:
    """Run a node. Returns the exit code when it stops or, detached, once it is up."""
    out, err = Console(highlight=False), Console(stderr=True, highlight=False)
    if detach:
        return _in_background(options, environ, out, err)
    spinner = out.status(f"starting the node in {options.home}") if out.is_terminal else None
    if spinner:
        spinner.start()

    def on_started(report: StartupReport) -> None:
        if spinner:
            spinner.stop()
        print_report(report, out, err, detached=False)

    def report_line(line: str) -> None:
        err.print(f"  {time.strftime('%H:%M:%S')} {line}", markup=False, soft_wrap=True)

    try:
        run_node(options, environ, on_started, report_line)
    finally:
        if spinner:
            spinner.stop()
    return 0


def run_node(
    options: UpOptions,
    environ: Mapping[str, str],
    on_started: Callable[[StartupReport], None],
    report_line: Callable[[str], None],
) -> None:
    """Supervise the node until it is told to stop. Raises ShoalError when it cannot start."""
    remember_secrets(environ)
    file_limit = set_up_process()
    home = Home(Path(options.home))
    with wrong_kinds_named(), disk_errors_named(home.root):
        if done := free_ballasts(home):
            report_line(done)
        _run_locked(home, options, python_environment(environ), on_started, report_line, file_limit)


def _run_locked(
    home: Home,
    options: UpOptions,
    environ: Mapping[str, str],
    on_started: Callable[[StartupReport], None],
    report_line: Callable[[str], None],
    file_limit: int,
) -> None:
    refuse_copy(home, saved_node_id(home.root))
    RunLock(home).acquire()
    try:
        plan = _plan(options, environ, home)
        remember_secrets({"SHOAL_NATS": ",".join(plan.joins)})
        stream = LogStream(RotatingLog(home.log("supervisor")))
        # `logging` uses only write and flush of a stream.
        logs.configure_logging("supervisor", plan.node, environ.get("SHOAL_LOG") or "info", cast(TextIO, stream))
        if problem := file_limit_problem(file_limit):
            log.warning("too few open files are allowed", reason=f"each service {problem}")
            report_line(f"each service {problem}")
        for pid in kill_orphans(home):
            log.warning("ended an orphan of a killed supervisor", pid=pid)
        plan = with_free_ports(plan, partial(_report_port, report_line))
        if plan.changes:
            # Into the file, not the environment: it survives restarts, and `shoal storage set` can change it.
            change_settings(home.root, plan.changes, lambda _: None)
        asyncio.run(_supervise(home, plan, environ, on_started, report_line))
    finally:
        # The lock is kept until this process has ended, which is what `shoal down` waits for.
        home.clear_run()


def _report_port(report_line: Callable[[str], None], line: str) -> None:
    log.warning("another port was chosen", reason=line)
    report_line(line)


def _plan(options: UpOptions, environ: Mapping[str, str], home: Home) -> NodePlan:
    settings = read_settings_file(home.root)
    node = ensure_node_id(home.root, options.node or None)
    if options.node and node != options.node:
        raise BadInput(
            f"the node in {home.root} is named {node} and keeps that name (I8): omit --node, or choose another "
            "--home for a new node"
        )
    identity = NodeIdentity(home.root, node)
    is_member, is_operator = identity.is_member, OperatorFiles(home.root).exists
    if is_member:
        identity.require_own()
    plan = make_plan(options, environ, settings, node, is_member)
    if is_member and plan.joins and is_operator:
        raise Refused(
            f"node {node} started a cluster and is its operator: it cannot use the NATS of another one; choose "
            "another --home for a second node"
        )
    if is_member and plan.runs_nats and not is_operator:
        raise Refused(
            f"node {node} has joined a cluster, but no NATS server is named in node.toml: put `nats` back into its "
            "section [cluster], or leave the cluster with `shoal leave`"
        )
    return plan


async def _supervise(
    home: Home,
    plan: NodePlan,
    environ: Mapping[str, str],
    on_started: Callable[[StartupReport], None],
    report_line: Callable[[str], None],
) -> None:
    try:
        await Supervisor(home, plan, environ, report_line).run(on_started)
    except BaseExceptionGroup as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from group


def _in_background(options: UpOptions, environ: Mapping[str, str], out: Console, err: Console) -> int:
    """Start the supervisor in a session of its own and wait for its report.

    The options go through its stdin, not its arguments: a NATS URL may hold a secret, and every user can read those.
    """
    home = Home(Path(options.home))
    with disk_errors_named(home.root):
        if done := free_ballasts(home):
            err.print(f"  {done}", markup=False, soft_wrap=True)
        home.create()
    with os.fdopen(open_private(home.log("supervisor"), os.O_WRONLY | os.O_APPEND), "ab") as log_file:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "shoal_cli.node.daemonize", options.home],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log_file,
            env=python_environment(environ),
            cwd=home.run,
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
        raise InternalError(
            f"the supervisor (pid {process.pid}) did not report in time; the last line of "
            f"{home.log('supervisor')}: {last[0] if last else 'none'}"
        )
    reply = decode(line, ControlReply)
    if reply.error is not None:
        process.wait()
        raise from_body(reply.error)
    report = decode(bytes(reply.result), StartupReport)
    print_report(report, out, err, detached=True)
    if report.not_ready:
        raise startup_error(report)
    return 0


def send_report(reply: ControlReply) -> None:
    """In the background process: send the reply to the waiting `shoal up -d`, and close its pipe."""
    with suppress(OSError):
        os.write(1, msgspec.json.encode(reply) + b"\n")
    devnull = os.open(os.devnull, os.O_RDWR)
    os.dup2(devnull, 1)
    os.close(devnull)
