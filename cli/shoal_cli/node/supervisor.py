"""The supervisor of a node: NATS first, then the services, all kept running until it is told to stop."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping

from shoal_cli.home import Home
from shoal_cli.node import control, leftovers, natsd
from shoal_cli.node.decide import ChildStatus, readiness
from shoal_cli.node.plan import (
    ChildSpec,
    NodePlan,
    bracketed,
    local_address,
    nats_spec,
    service_spec,
    url_token,
    without_token,
)
from shoal_cli.node.ports import check_gateway_port, free_port
from shoal_cli.node.process import Child
from shoal_cli.node.readiness import AnswersHealth, Greets, Readiness, SaysReady
from shoal_cli.node.report import UpReport, missing
from shoal_cli.node.rotate import RotatingLog
from shoal_common.config import is_loopback
from shoal_common.credentials import bearer
from shoal_common.errors import BadMessage, Expired, NotFound, Unavailable
from shoal_common.interfaces import read_interfaces
from shoal_common.logs import Log
from shoal_common.reach import meeting_host

log = Log("supervisor")

_NATS_DEADLINE_S = 30.0
_RESTART_DEADLINE_S = 60.0


class Supervisor:
    """Runs one plan. `news` is given lines for a person, as they happen."""

    def __init__(self, home: Home, plan: NodePlan, environ: Mapping[str, str], news: Callable[[str], None]) -> None:
        self._home, self._plan, self._environ, self._tell = home, plan, environ, news
        self._children: dict[str, Child] = {}
        self._heard: list[SaysReady] = []
        self._nats_urls = list(plan.joins)
        self._gateway = ""
        self._started_at_s = time.time()
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()
        self._recorded: set[int] = set()

    async def run(self, when_up: Callable[[UpReport], None]) -> None:
        """Run until a signal or `stop`. `when_up` is told once how starting went. Raises when NATS cannot start."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)
        sockets = control.Sockets(self._home)
        try:
            server = await control.serve(sockets.control, self._handle)
            try:
                async with asyncio.TaskGroup() as tasks:
                    await self._run(tasks, sockets, when_up)
            finally:
                server.close()
        finally:
            for said in self._heard:
                said.close()
            sockets.remove()
            self._home.gateway_url.unlink(missing_ok=True)

    async def _run(
        self, tasks: asyncio.TaskGroup, sockets: control.Sockets, when_up: Callable[[UpReport], None]
    ) -> None:
        try:
            if "gateway" in self._plan.services:
                check_gateway_port(self._plan.bind, self._plan.gateway_port)
            if self._plan.runs_nats:
                await self._start_nats(tasks)
            if not self._stopping.is_set():
                self._start_services(tasks, sockets)
                announcing = tasks.create_task(self._announce(when_up))
                await self._stopping.wait()
                announcing.cancel()
        finally:
            # The services' last words go over NATS: it stops after them.
            await asyncio.gather(*(c.stop() for name, c in self._children.items() if name != "nats"))
            if "nats" in self._children:
                await self._children["nats"].stop()
            self._home.children.unlink(missing_ok=True)

    def _on_signal(self) -> None:
        if not self._stopping.is_set():
            self._tell("stopping; once more kills")
            self._stopping.set()
            return
        log.warning("told twice to stop: killing what is left")
        for child in self._children.values():
            child.kill()

    # Starting

    async def _start_nats(self, tasks: asyncio.TaskGroup) -> None:
        home, plan = self._home, self._plan
        program = natsd.find_program()
        await natsd.check_port_is_free(plan.bind, plan.nats_port)
        natsd.forget_old_ports(home)
        natsd.write_config(home, plan, plan.nats_port or free_port(plan.bind))
        greets = Greets(home)
        self._keep(tasks, nats_spec(program, home.nats_config, self._environ), greets)
        await self._until(lambda: readiness(self._statuses()) != "waiting", _NATS_DEADLINE_S)
        if self._stopping.is_set():
            return
        if greets.ports is None:
            [not_up] = missing(home, self._statuses())
            raise Unavailable(
                f"NATS does not start ({not_up.why}): {not_up.tail[-1] if not_up.tail else 'it said nothing'}; "
                f"see {not_up.log}"
            )
        port = natsd.port_of(greets.ports)
        # A chosen port is kept: a restarted server must be where the services look for it.
        natsd.write_config(home, plan, port)
        credential = f"{plan.secret}@" if plan.secret else ""
        self._nats_urls = [f"nats://{credential}{bracketed(local_address(plan.bind))}:{port}"]

    def _start_services(self, tasks: asyncio.TaskGroup, sockets: control.Sockets) -> None:
        plan = self._plan
        port = plan.gateway_port or free_port(plan.bind)
        if "gateway" in plan.services:
            self._gateway = f"http://{bracketed(local_address(plan.bind))}:{port}"
            self._home.gateway_url.write_text(f"{self._gateway}\n")
        for service in plan.services:
            spec = service_spec(plan, service, self._nats_urls, port, sys.executable, self._environ)
            said = SaysReady(sockets.directory / f"{service}.notify")
            self._heard.append(said)
            spec.environ["NOTIFY_SOCKET"] = str(said.path)
            self._keep(tasks, spec, self._gateway_answers() if service == "gateway" else said)

    def _gateway_answers(self) -> AnswersHealth:
        return AnswersHealth(self._gateway, bearer(self._plan.secret, "api"))

    def _keep(self, tasks: asyncio.TaskGroup, spec: ChildSpec, ready: Readiness) -> None:
        child = Child(spec, RotatingLog(self._home.log(spec.name)), ready, self._on_change)
        self._children[spec.name] = child
        tasks.create_task(child.run())

    async def _announce(self, when_up: Callable[[UpReport], None]) -> None:
        await self._until(lambda: readiness(self._statuses()) != "waiting", self._plan.ready_deadline_s)
        report = self._report()
        log.info("up" if not report.not_up else "not whole", not_up=",".join(n.name for n in report.not_up))
        when_up(report)

    def _report(self) -> UpReport:
        plan, statuses = self._plan, self._statuses()
        return UpReport(
            node=plan.node,
            pid=os.getpid(),
            home=str(self._home.root),
            nats=[without_token(u) for u in self._nats_urls],
            gateway=self._gateway,
            logs=str(self._home.logs),
            ready=[s.name for s in statuses if s.phase == "ready" and s.name != "nats"],
            not_up=missing(self._home, statuses),
            join=self._join_command(),
            bind="" if is_loopback(plan.bind) else plan.bind,
        )

    def _join_command(self) -> str:
        plan = self._plan
        if not plan.runs_nats or is_loopback(plan.bind):
            return ""
        url = self._nats_urls[0]
        port = url.rpartition(":")[2]
        advertised = self._environ.get("SHOAL_ADVERTISE", "").split(",")[0].strip()
        anywhere = local_address(plan.bind) != plan.bind
        host = advertised or (meeting_host(read_interfaces(), plan.bind) if anywhere else plan.bind)
        return f"shoal up --nats nats://{url_token(url)}@{bracketed(host)}:{port}"

    # Following

    def _statuses(self) -> list[ChildStatus]:
        return [c.status for c in self._children.values()]

    def _on_change(self, news: str) -> None:
        pids = {s.pid for s in self._statuses() if s.pid}
        if pids - self._recorded:
            leftovers.record(self._home, pids)
        self._recorded = pids
        self._changed.set()
        self._changed = asyncio.Event()
        if news and not self._stopping.is_set():
            self._tell(news)

    async def _until(self, wanted: Callable[[], bool], deadline_s: float) -> bool:
        """Whether it came true before the deadline and before we were told to stop."""
        stopped = asyncio.ensure_future(self._stopping.wait())
        try:
            async with asyncio.timeout(deadline_s):
                while not (wanted() or stopped.done()):
                    changed = asyncio.ensure_future(self._changed.wait())
                    try:
                        await asyncio.wait({changed, stopped}, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        changed.cancel()
        except TimeoutError:
            pass
        finally:
            stopped.cancel()
        return wanted()

    # The control socket

    async def _handle(self, request: control.Request) -> object:
        match request.op:
            case "status":
                return control.Status(
                    node=self._plan.node,
                    pid=os.getpid(),
                    started_at_s=round(self._started_at_s, 1),
                    stopping=self._stopping.is_set(),
                    nats=[without_token(u) for u in self._nats_urls],
                    gateway=self._gateway,
                    logs=str(self._home.logs),
                    children=self._statuses(),
                )
            case "restart":
                return await self._restart(request.service)
            case "stop":
                # Answered first: the answer says who is stopping, and its end is seen by the lock.
                asyncio.get_running_loop().call_soon(self._stopping.set)
                return {"pid": os.getpid()}
        raise BadMessage(f"the supervisor has no request {request.op[:80]!r}; it has status, restart and stop")

    async def _restart(self, name: str) -> ChildStatus:
        child = self._children.get(name)
        if child is None:
            raise NotFound(f"this node runs no {name[:80]!r}; it runs {', '.join(self._children)}")
        before = child.status.pid
        await child.restart()
        if not await self._until(
            lambda: child.status.phase == "ready" and child.status.pid != before, _RESTART_DEADLINE_S
        ):
            raise Expired(f"{name} was restarted and is not ready yet: see `shoal logs {name}`")
        log.info("restarted", service=name, pid_before=before, pid=child.status.pid)
        return child.status
