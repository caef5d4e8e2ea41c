"""The main loop of every service: connect, claim the liveness key, run, drain, stop within a deadline.

A service is a coroutine function `run(context)`. It opens what it needs, calls `context.ready(...)`, and returns soon
after `context.stopping` is set. If it raises, the process ends with an exit code and the supervisor restarts it:
there is no half-dead service.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from typing import Literal, overload

from nats.js.errors import NotFoundError

from shoal_common import VERSION, logs, telemetry
from shoal_common.bus import cluster_clock
from shoal_common.bus.connection import DRAIN_TIMEOUT_S, Nats, connected, login_of
from shoal_common.bus.events import EventEmitter
from shoal_common.bus.keys import member_key
from shoal_common.bus.kv_bucket import Buckets
from shoal_common.bus.kv_mirror import KvMirror, follow_forever
from shoal_common.bus.streams import (
    BucketMark,
    ensure_streams,
    lost_buckets,
    read_bucket_marks,
    wait_for_streams,
)
from shoal_common.concurrency import cancellation
from shoal_common.concurrency.backoff import Backoff
from shoal_common.concurrency.cancellation import DetachedTasks, cancel_and_wait, describe
from shoal_common.config import Config, read_config
from shoal_common.errors import ShoalError, Unavailable
from shoal_common.host.file_kinds import wrong_kind, wrong_kinds_named
from shoal_common.host.interfaces import InterfaceMonitor
from shoal_common.host.own_process import enter_run_directory, file_limit_problem, set_up_process
from shoal_common.host.sd_notify import ServiceManagerNotifier
from shoal_common.identity.peer_secrets import PeerSecrets
from shoal_common.liveness.compatibility import CompatibleLiveMirror, check_cluster_version
from shoal_common.liveness.liveness import Liveness
from shoal_common.logs import StructuredLogger
from shoal_common.messages.liveness import NodeAddress, NodeFacts
from shoal_common.messages.membership import Member
from shoal_common.redaction import remember_secrets
from shoal_common.rpc.command_worker import CommandHandler, CommandWorker
from shoal_common.rpc.request_reply import RpcClient, RpcEndpoint, serve

log = StructuredLogger("service")

STOP_DEADLINE_S = 10.0
_DELETE_KEY_TIMEOUT_S = 2.0
_DISCONNECT_DEADLINE_S = _DELETE_KEY_TIMEOUT_S + DRAIN_TIMEOUT_S
_SIGNAL_REPEAT_S = 0.5
MIRROR_DEADLINE_S = 30.0
STORE_CHECKS = Backoff(1.0, 30.0)
"""Often at first: what was published since the last check is not missed when it is lost."""
_SHARED_THREADS = 32
"""Of the loop, however few cores there are: some hash for minutes. What may hang has threads of its own."""


class ServiceContext:
    """What a running service works with."""

    def __init__(
        self,
        config: Config,
        environ: Mapping[str, str],
        nats: Nats,
        liveness: Liveness,
        supervisor: ServiceManagerNotifier,
    ) -> None:
        self.config, self.environ, self.nats, self.liveness = config, environ, nats, liveness
        self.node = config.node
        self.buckets = Buckets(nats.js)
        self.events = EventEmitter(nats, config.service, config.node)
        self.rpc = RpcClient(nats)
        self.stopping = asyncio.Event()
        self.detached = DetachedTasks()
        """Tasks of commands that complete once begun; `run_commands` waits for them."""
        self.interfaces = InterfaceMonitor()
        self._supervisor = supervisor

    def ready(self, facts: NodeFacts | None = None) -> None:
        """Report that the service works. The supervisor is told once peers can read these facts."""

        def published() -> None:
            self._supervisor.notify(f"READY=1\nSTATUS=node {self.node}")
            log.info("ready", version=VERSION, addresses=",".join(self.liveness.facts.addresses))

        self.liveness.publish_now(facts, published)

    async def follow_interfaces(self, port: int | None = None, bind: str = "", tls: bool = False) -> None:
        """Keep `interfaces` current from now on, and publish the addresses of a data port if there is one.

        `bind` is the address that it listens on, if not the node's; `tls`, whether it speaks TLS.
        """

        def read_links() -> list[NodeAddress]:
            interfaces = self.interfaces.refresh()
            return [] if port is None else self.config.links(port, interfaces, bind, tls)

        await asyncio.to_thread(self.interfaces.refresh)
        self.liveness.track_addresses(read_links)

    async def serve(self, endpoints: Mapping[str, RpcEndpoint]) -> None:
        """Answer RPC requests until stopping."""
        await serve(self.nats, self.config.service, self.node, endpoints, self.stopping)

    async def run_commands(
        self, verbs: Mapping[str, CommandHandler], address: str | None = None, until: asyncio.Event | None = None
    ) -> None:
        """Run commands for this node (or `any`) until stopping."""
        worker = CommandWorker(self.nats, self.buckets, self.events, self.config.service, self.node, verbs)
        await worker.run(address or self.node, until or self.stopping)
        await self.detached.wait_ended()

    @overload
    async def mirror(self, tasks: asyncio.TaskGroup, bucket: Literal["live"], *keys: str) -> CompatibleLiveMirror: ...

    @overload
    async def mirror(self, tasks: asyncio.TaskGroup, bucket: str, *keys: str) -> KvMirror: ...

    async def mirror(self, tasks: asyncio.TaskGroup, bucket: str, *keys: str) -> KvMirror:
        """Return a complete mirror of a bucket; a task of the group keeps it current until stopping.

        The mirror of `live` leaves out services of another major version, which are ignored everywhere.
        """
        view = CompatibleLiveMirror() if bucket == "live" else KvMirror(bucket)
        tasks.create_task(self._until_stopping(follow_forever(self.nats, view, *keys)))
        await view.wait_loaded(MIRROR_DEADLINE_S)
        return view

    async def peer_secrets(self, tasks: asyncio.TaskGroup) -> PeerSecrets:
        """Return what this node shares with each other one; a task of the group follows who is a member."""
        if self.config.identity is None:
            return PeerSecrets(None, lambda _: None)
        members = await self.mirror(tasks, "spec", "member.*")
        return PeerSecrets(self.config.identity, certificates_in(members))

    async def _until_stopping(self, work: Awaitable[None]) -> None:
        working = asyncio.ensure_future(work)
        stopped = asyncio.ensure_future(self.stopping.wait())
        try:
            await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel_and_wait(working, stopped)
            if not working.cancelled():
                working.result()

    def run_in_background(self, tasks: asyncio.TaskGroup, work: Awaitable[None]) -> None:
        """Run endless work as a task that is cancelled when the service stops."""
        tasks.create_task(self._until_stopping(work))


def certificates_in(members: KvMirror) -> Callable[[str], str | None]:
    """Return what looks up the certificate of a member in a mirror of `spec`; None for a stranger."""

    def certificate_of(node: str) -> str | None:
        member = members.get(member_key(node), Member)
        return member.certificate if member else None

    return certificate_of


def _connection(config: Config) -> AbstractAsyncContextManager[Nats]:
    login = login_of(config.identity, config.service) if config.identity else None
    return connected(config.nats, name=f"{config.service}.{config.node}", login=login)


def _stream_check(nats: Nats, config: Config) -> Callable[[], Awaitable[None]]:
    """Return what makes sure of the streams: without an operator, whichever service comes first makes them."""
    if config.identity is not None:
        return partial(wait_for_streams, nats.js)
    return partial(ensure_streams, nats.js, config.replicas)


async def _watch_store(nats: Nats, have_streams: Callable[[], Awaitable[None]], liveness: Liveness) -> None:
    # A NATS that lost its store comes back without streams; a stream may also be purged or removed while it is up.
    # Every service creates what is missing (the first one wins) and publishes its state again.
    seen, marks = nats.reconnects.count, await read_bucket_marks(nats.js)
    synchronized_s = time.monotonic()
    for checks in itertools.count(1):
        with suppress(TimeoutError):
            async with asyncio.timeout(STORE_CHECKS.delay_s(checks)):
                await nats.reconnects.wait_after(seen)
        has_reconnected, seen = nats.reconnects.count != seen, nats.reconnects.count
        # Down, or lost again meanwhile: the next reconnection or check repeats this.
        with suppress(Unavailable, NotFoundError):
            if has_reconnected:
                await have_streams()
                liveness.renew_now()
            lost = await _find_lost_buckets(nats, have_streams, marks)
            if lost:
                log.warning("NATS lost what it stored; publishing this service's state again", buckets=",".join(lost))
                await have_streams()
                if not has_reconnected:
                    nats.reconnects.notify()  # mirrors and publishers start afresh, as after an outage
                    seen = nats.reconnects.count
                    liveness.renew_now()
                nats.store_wipes.notify()
        if has_reconnected or time.monotonic() - synchronized_s > cluster_clock.SYNC_INTERVAL_S:
            synchronized_s = time.monotonic()
            await cluster_clock.sync_from_nats(nats.client)


async def _find_lost_buckets(
    nats: Nats, have_streams: Callable[[], Awaitable[None]], marks: dict[str, BucketMark]
) -> list[str]:
    """Return the buckets that lost what `marks` says they held, and update it."""
    try:
        found = await read_bucket_marks(nats.js)
    except NotFoundError:
        await have_streams()
        found = await read_bucket_marks(nats.js)
    lost = lost_buckets(marks, found)
    marks.update(found)
    return lost


async def _run(config: Config, environ: Mapping[str, str], run: Callable[[ServiceContext], Awaitable[None]]) -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_SHARED_THREADS, "shared"))
    supervisor = ServiceManagerNotifier(environ)
    stopping = asyncio.Event()
    main_task = asyncio.current_task()
    assert main_task is not None

    signalled_s: float | None = None

    def on_signal(number: signal.Signals) -> None:
        nonlocal signalled_s
        now_s = time.monotonic()
        if signalled_s is None:
            signalled_s = now_s
        elif number == signal.SIGINT or now_s - signalled_s > _SIGNAL_REPEAT_S:
            os._exit(130)  # a second request to stop: exit at once
        else:
            return  # the kernel may repeat the signal of a dying supervisor
        stopping.set()
        supervisor.notify("STOPPING=1")
        log.info("stopping")
        _exit_if_running_in(STOP_DEADLINE_S + cancellation.CLEANUP_DEADLINE_S)
        if not serving:
            main_task.cancel()

    serving = False
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)

    async with _connection(config) as nats:
        url = nats.client.connected_url
        log.info("connected", nats=f"{url.hostname}:{url.port}" if url else "")
        have_streams = _stream_check(nats, config)
        await have_streams()
        await cluster_clock.sync_from_nats(nats.client)
        liveness = Liveness(Buckets(nats.js).live, config.node, config.service)
        await check_cluster_version(nats, config.node, config.service)
        await liveness.claim()
        try:
            context = ServiceContext(config, environ, nats, liveness, supervisor)
            context.stopping = stopping
            serving = True
            async with asyncio.TaskGroup() as tasks:
                helpers = [
                    tasks.create_task(liveness.renew_forever()),
                    tasks.create_task(supervisor.watchdog_forever()),
                    tasks.create_task(_watch_store(nats, have_streams, liveness)),
                ]
                running = asyncio.ensure_future(run(context))
                helpers.append(tasks.create_task(_stop_in_time(running, stopping)))
                try:
                    await running
                finally:
                    _exit_if_running_in(cancellation.CLEANUP_DEADLINE_S + _DISCONNECT_DEADLINE_S)
                    for task in helpers:
                        task.cancel()
        finally:
            with suppress(Exception):
                async with asyncio.timeout(_DELETE_KEY_TIMEOUT_S):
                    await liveness.remove_key()


async def _stop_in_time(running: asyncio.Future[None], stopping: asyncio.Event) -> None:
    await stopping.wait()
    await asyncio.sleep(STOP_DEADLINE_S)
    log.warning("not stopped in time; cancelling the rest", deadline_s=STOP_DEADLINE_S)
    running.cancel()


def _exit_if_running_in(deadline_s: float) -> None:
    """End the process if its loop still runs then: a task that does not end must not keep a service half dead."""

    def exit_now() -> None:
        log.error("tasks did not end; exiting", tasks=describe(*asyncio.all_tasks()))
        os._exit(1)

    asyncio.get_running_loop().call_later(deadline_s, exit_now)


def _first_cause(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def main(service: str, run: Callable[[ServiceContext], Awaitable[None]]) -> int:
    """Run a service to its end and return the exit code: 0, or that of the error that ended it."""
    environ = dict(os.environ)
    remember_secrets(environ)
    file_limit = set_up_process()
    try:
        with wrong_kinds_named():
            config = read_config(service, environ)
    except (ShoalError, OSError) as e:
        print(f"shoal {service}: {e}", file=sys.stderr)  # noqa: T201  # logging is not set up yet
        return e.exit_code if isinstance(e, ShoalError) else 1
    enter_run_directory(config.home)
    logs.configure_logging(service, config.node, config.log_level)
    if problem := file_limit_problem(file_limit):
        log.warning("too few open files are allowed", reason=f"this process {problem}")
    finish = telemetry.set_up(service, config.node, environ)
    try:
        asyncio.run(_run(config, environ, run))
    except asyncio.CancelledError:
        pass
    except BaseException as group:  # noqa: BLE001  # the process ends here; its exit code says how
        cause = _first_cause(group)
        cause = wrong_kind(cause) or cause
        if isinstance(cause, asyncio.CancelledError | KeyboardInterrupt):
            return 0
        if isinstance(cause, ShoalError):
            log.error("ended", reason=cause.message, code=cause.code)
            return cause.exit_code
        log.error("crashed", exc=cause, reason=str(cause) or type(cause).__name__)
        return 1
    finally:
        finish()
    log.info("stopped")
    return 0
