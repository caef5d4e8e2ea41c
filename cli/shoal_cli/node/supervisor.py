"""The supervisor of a node: starts NATS, then the services, and keeps them running until it is told to stop."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from shoal_cli.membership.machine_hosts import machine_hosts
from shoal_cli.membership.operator import INVITATION_LIFETIME_S, Operator
from shoal_cli.membership.operator_files import OperatorFiles
from shoal_cli.node import control
from shoal_cli.node.children import nats_process, orphans
from shoal_cli.node.children.child_process import ChildProcess
from shoal_cli.node.children.nats_disk import NatsDisk
from shoal_cli.node.children.readiness import HttpHealthReadiness, NatsInfoReadiness, Readiness, SdNotifyReadiness
from shoal_cli.node.children.restart_policy import ChildStatus, readiness
from shoal_cli.node.logs import nats_format
from shoal_cli.node.logs.log_rotation import RotatingLog
from shoal_cli.node.node_plan import (
    ChildSpec,
    NodePlan,
    bracketed,
    local_address,
    nats_spec,
    service_spec,
    without_token,
)
from shoal_cli.node.startup_report import StartupReport, not_ready
from shoal_cli.node_home import Home
from shoal_common.bus.connection import connected, login_of
from shoal_common.concurrency.cancellation import cancel_and_wait
from shoal_common.concurrency.notifier import Notifier
from shoal_common.config import is_loopback, read_settings_file, store_directory
from shoal_common.errors import BadMessage, DiskFull, Expired, NotFound, Refused, Unavailable
from shoal_common.host.addresses import join_host
from shoal_common.host.interfaces import read_interfaces
from shoal_common.http.scheme import gateway_scheme
from shoal_common.identity.node_identity import CLI, NodeIdentity
from shoal_common.logs import StructuredLogger
from shoal_common.settings.node import NodeSettings, PortSettings, StorageSettings, TlsSettings
from shoal_common.settings.ports import fileserver_ports, stage_ports
from shoal_common.settings.values import read_settings, read_valid_settings

log = StructuredLogger("supervisor")

_NATS_DEADLINE_S = 30.0
_HANDSHAKE_S = 5.0
_RESTART_DEADLINE_S = 60.0


class Supervisor:
    """Runs one plan. `report` is given lines for a person, as things happen."""

    def __init__(self, home: Home, plan: NodePlan, environ: Mapping[str, str], report: Callable[[str], None]) -> None:
        self._home, self._plan, self._environ, self._print = home, plan, environ, report
        self._children: dict[str, ChildProcess] = {}
        self._notify_sockets: list[SdNotifyReadiness] = []
        self._nats_urls = list(plan.joins)
        self._gateway = ""
        self._nats_log = nats_format.NatsLog(plan.node)
        self._identity = NodeIdentity(home.root, plan.node)
        self._operator_files = OperatorFiles(home.root)
        self._operator: Operator | None = None
        self._operating: asyncio.Task[None] | None = None
        self._nats_disk = self._make_nats_disk()
        self._watching_disk: asyncio.Task[None] | None = None
        self._started_at_s = time.time()
        self._stopping = asyncio.Event()
        self._changed = Notifier()
        self._recorded: set[int] = set()

    async def run(self, on_started: Callable[[StartupReport], None]) -> None:
        """Run until a signal or `stop`; `on_started` gets the outcome of starting. Raises when NATS cannot start."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)
        sockets = control.ControlSockets(self._home)
        try:
            server = await control.serve(sockets.control, self._handle)
            try:
                async with asyncio.TaskGroup() as tasks:
                    await self._run(tasks, sockets, on_started)
            finally:
                server.close()
        finally:
            for notify_socket in self._notify_sockets:
                notify_socket.close()
            sockets.remove()
            self._home.gateway_url.unlink(missing_ok=True)

    async def _run(
        self, tasks: asyncio.TaskGroup, sockets: control.ControlSockets, on_started: Callable[[StartupReport], None]
    ) -> None:
        try:
            if self._plan.runs_nats:
                await self._start_nats(tasks)
            elif self._identity.is_member:
                await self._check_membership()
            if not self._stopping.is_set():
                self._start_services(tasks, sockets)
                reporting = tasks.create_task(self._report_started(on_started))
                await self._stopping.wait()
                reporting.cancel()
        finally:
            # The services publish their end over NATS: it stops after them.
            await asyncio.gather(*(c.stop() for name, c in self._children.items() if name != "nats"))
            for task in (self._operating, self._watching_disk):
                if task is not None:
                    await cancel_and_wait(task)
            if "nats" in self._children:
                await self._children["nats"].stop()
            self._home.children.unlink(missing_ok=True)

    def _on_signal(self) -> None:
        if not self._stopping.is_set():
            self._print("stopping; Ctrl-C again kills")
            self._stop()
            return
        log.warning("second stop signal: killing all children")
        for child in self._children.values():
            child.kill()

    def _stop(self) -> None:
        self._stopping.set()
        self._changed.notify()

    # Starting

    async def _start_nats(self, tasks: asyncio.TaskGroup) -> None:
        home, plan = self._home, self._plan
        program = nats_process.find_program()
        await nats_process.check_port_is_free(plan.bind, plan.nats_port)
        nats_process.remove_stale_port_files(home)
        hosts = await asyncio.to_thread(machine_hosts, self._environ)
        await asyncio.to_thread(self._operator_files.create, self._identity, hosts)
        self._write_nats_config()
        nats_ready = NatsInfoReadiness(home)
        self._keep(tasks, nats_spec(program, home.nats_config, self._environ), nats_ready)
        self._watching_disk = tasks.create_task(
            self._nats_disk.watch_forever(self._children["nats"], self._on_change)
        )
        await self._wait_for(lambda: readiness(self._statuses()) != "waiting", _NATS_DEADLINE_S)
        if self._stopping.is_set():
            return
        if nats_ready.ports is None:
            self._require_room()
            [child] = not_ready(home, self._statuses())
            last = nats_format.message_of(child.tail[-1]) if child.tail else "its log is empty"
            raise Unavailable(f"NATS does not start ({child.reason}): {last}; see {child.log}")
        self._nats_urls = [f"tls://{bracketed(local_address(plan.bind))}:{plan.nats_port}"]
        operator = self._operator = Operator(self._operator_files, plan.node, self._reload_users)
        self._operating = tasks.create_task(
            operator.run(self._nats_urls[0], [f"tls://{self._cluster_address()}"], self._changed.notify)
        )
        if not await self._wait_for(lambda: operator.is_ready, _NATS_DEADLINE_S) and not self._stopping.is_set():
            self._require_room()
            raise Unavailable(f"NATS runs, but its streams cannot be made: see {home.log('supervisor')}")

    def _make_nats_disk(self) -> NatsDisk:
        settings = read_settings_file(self._home.root)
        store = store_directory(self._home.root, settings) if "storage" in self._plan.services else None
        storage, _ = read_valid_settings(StorageSettings, settings, self._environ)
        return NatsDisk(self._home, store, storage.ballast_bytes)

    def _require_room(self) -> None:
        if problem := self._children["nats"].problem:
            raise DiskFull(problem)

    async def _check_membership(self) -> None:
        """Raise Denied if the cluster does not know this node any more: one line, not six services in a loop."""
        try:
            login = login_of(self._identity, CLI)
            async with connected(self._plan.joins, f"supervisor.{self._plan.node}", _HANDSHAKE_S, login):
                return
        except Unavailable as e:
            log.warning("NATS does not answer yet; the services wait for it", reason=e.message)

    def _write_nats_config(self, probe_nkey: str = "") -> None:
        nats_process.write_config(self._home, self._plan, self._operator_files, probe_nkey)

    def _reload_users(self, probe_nkey: str) -> None:
        self._write_nats_config(probe_nkey)
        self._children["nats"].send_signal(signal.SIGHUP)

    def _start_services(self, tasks: asyncio.TaskGroup, sockets: control.ControlSockets) -> None:
        plan = self._plan
        port = plan.gateway_port
        if "gateway" in plan.services:
            self._gateway = f"{self._gateway_scheme()}://{bracketed(local_address(plan.bind))}:{port}"
            self._home.gateway_url.write_text(f"{self._gateway}\n")
        for service in plan.services:
            spec = service_spec(plan, service, self._nats_urls, port, sys.executable, self._environ)
            notify_socket = SdNotifyReadiness(sockets.directory / f"{service}.notify")
            self._notify_sockets.append(notify_socket)
            spec.environ["NOTIFY_SOCKET"] = str(notify_socket.path)
            self._keep(tasks, spec, self._gateway_health() if service == "gateway" else notify_socket)

    def _gateway_scheme(self) -> str:
        tls = read_settings(TlsSettings, read_settings_file(self._home.root), self._environ).tls
        return gateway_scheme(self._plan.bind, self._identity.is_member, tls)

    def _gateway_health(self) -> HttpHealthReadiness:
        authority = self._identity.authority if self._gateway.startswith("https:") else b""
        return HttpHealthReadiness(self._gateway, self._plan.node, authority)

    def _keep(self, tasks: asyncio.TaskGroup, spec: ChildSpec, ready: Readiness) -> None:
        # nats-server cannot be told a log format: its lines are translated on their way into the file.
        translate = self._translate_nats_line if spec.name == "nats" else None
        child = ChildProcess(spec, RotatingLog(self._home.log(spec.name)), ready, self._on_change, translate)
        self._children[spec.name] = child
        tasks.create_task(child.run())

    def _translate_nats_line(self, line: bytes) -> bytes:
        self._nats_disk.read_log_line(line)
        return self._nats_log.translate(line, time.time())

    async def _report_started(self, on_started: Callable[[StartupReport], None]) -> None:
        await self._wait_for(lambda: readiness(self._statuses()) != "waiting", self._plan.ready_deadline_s)
        report = self._report()
        log.info("node started", not_ready=",".join(n.name for n in report.not_ready))
        on_started(report)

    def _report(self) -> StartupReport:
        plan, statuses = self._plan, self._statuses()
        return StartupReport(
            node=plan.node,
            pid=os.getpid(),
            home=str(self._home.root),
            nats=[without_token(u) for u in self._nats_urls],
            gateway=self._gateway,
            logs=str(self._home.logs),
            ready=[s.name for s in statuses if s.phase == "ready" and s.name != "nats"],
            not_ready=not_ready(self._home, statuses),
            can_invite=self._operator is not None and not is_loopback(plan.bind),
            bind="" if is_loopback(plan.bind) else plan.bind,
            ports=self._ports(),
        )

    def _ports(self) -> dict[str, list[int]]:
        """Return the ports by who listens. The fileserver may have chosen its own, and kept it."""
        plan, saved = self._plan, read_settings_file(self._home.root)
        settings = read_settings(PortSettings, saved, self._environ)
        ports = {"nats": [plan.nats_port]} if plan.runs_nats else {}
        if "gateway" in plan.services:
            ports["gateway"] = [plan.gateway_port]
        if "fileserver" in plan.services:
            ports["fileserver"] = fileserver_ports(settings, saved)[:1]
        if "inference" in plan.services:
            ports["stages"] = [port for port in stage_ports(settings) if port]
        return ports

    def _cluster_address(self) -> str:
        """Return the address of NATS, `host:port`, as other machines reach it if any does."""
        plan = self._plan
        advertised = self._environ.get("SHOAL_ADVERTISE", "").split(",")[0].strip()
        binds_all = local_address(plan.bind) != plan.bind
        host = advertised or (join_host(read_interfaces(), plan.bind) if binds_all else plan.bind)
        return f"{bracketed(host)}:{plan.nats_port}"

    # Status

    def _statuses(self) -> list[ChildStatus]:
        return [c.status for c in self._children.values()]

    def _on_change(self, text: str) -> None:
        pids = {s.pid for s in self._statuses() if s.pid}
        if pids - self._recorded:
            orphans.record(self._home, self._plan.node, pids)
        self._recorded = pids
        self._changed.notify()
        if text and not self._stopping.is_set():
            self._print(text)

    async def _wait_for(self, condition: Callable[[], bool], deadline_s: float) -> bool:
        """Return whether the condition became true before the deadline and before the stop signal."""
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                await self._changed.wait_until(lambda: condition() or self._stopping.is_set())
        return condition()

    # The control socket

    async def _handle(self, request: control.ControlRequest) -> object:
        match request.op:
            case "status":
                return control.SupervisorStatus(
                    node=self._plan.node,
                    pid=os.getpid(),
                    started_at_s=round(self._started_at_s, 1),
                    stopping=self._stopping.is_set(),
                    nats=[without_token(u) for u in self._nats_urls],
                    gateway=self._gateway,
                    logs=str(self._home.logs),
                    children=self._statuses(),
                    bind=self._plan.bind,
                    ports=self._ports(),
                    hub=self._plan.hub,
                    kept=sorted(read_settings_file(self._home.root).get(NodeSettings.section, {})),
                )
            case "restart":
                return await self._restart(request.service)
            case "invite":
                return await self._invite(request.lifetime_s or INVITATION_LIFETIME_S)
            case "revoke":
                await self._require_operator().revoke(request.node)
                return {}
            case "stop":
                # Answered first: the reply says which process stops; the lock shows when it has.
                asyncio.get_running_loop().call_soon(self._stop)
                return {"pid": os.getpid()}
        raise BadMessage(
            f"unknown request {request.op[:80]!r}: the supervisor knows status, restart, invite, revoke and stop"
        )

    async def _invite(self, lifetime_s: float) -> control.InviteReply:
        code = await self._require_operator().invite(lifetime_s)
        return control.InviteReply(
            code=code.text,
            address=self._cluster_address(),
            is_local=is_loopback(self._plan.bind),
            until_s=round(time.time() + lifetime_s, 1),
        )

    def _require_operator(self) -> Operator:
        if self._operator is None:
            raise Refused(
                f"node {self._plan.node} has joined a cluster: invite and revoke on the node that started it, "
                f"{', '.join(map(without_token, self._plan.joins))}"
            )
        return self._operator

    async def _restart(self, name: str) -> ChildStatus:
        child = self._children.get(name)
        if child is None:
            raise NotFound(f"this node does not run {name[:80]!r}; it runs {', '.join(self._children)}")
        before = child.status.pid
        await child.restart()
        if not await self._wait_for(
            lambda: child.status.phase == "ready" and child.status.pid != before, _RESTART_DEADLINE_S
        ):
            raise Expired(f"{name} was restarted but is not ready yet: see `shoal logs {name}`")
        log.info("restarted", child=name, pid_before=before, pid=child.status.pid)
        return child.status
