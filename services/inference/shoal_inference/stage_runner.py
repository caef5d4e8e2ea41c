"""Run one stage of one instance on this node: fetch its model, spawn its process, publish its state and tokens."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections.abc import Sequence
from contextlib import suppress

from msgspec import structs
from nats.errors import Error as NatsError

from shoal_common.bus import subjects
from shoal_common.bus.connection import Nats
from shoal_common.bus.keys import model_key, shard_key, stage_key
from shoal_common.bus.kv_bucket import Buckets
from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.concurrency.backoff import Backoff
from shoal_common.config import Config, is_loopback
from shoal_common.errors import (
    ErrorBody,
    LoadError,
    ShoalError,
    StageLost,
    Unavailable,
    Unsupported,
    from_body,
)
from shoal_common.host.addresses import non_loopback
from shoal_common.host.interfaces import InterfaceMonitor
from shoal_common.identity.node_identity import NodeIdentity
from shoal_common.identity.peer_links import PeerLinks
from shoal_common.identity.peer_secrets import PeerSecrets
from shoal_common.identity.peer_tokens import mac_of
from shoal_common.liveness.peer_failure import PeerFailureReporter
from shoal_common.logs import StructuredLogger
from shoal_common.messages import downloads, encode
from shoal_common.messages.generation import Accepted, Generate, TokenEvent
from shoal_common.messages.instances import StageState
from shoal_common.messages.liveness import NodeAddress
from shoal_common.messages.storage import ModelState, ShardState
from shoal_common.models.kv_cache import MAX_REQUESTS_PER_INSTANCE
from shoal_common.models.layer_tensors import covers
from shoal_common.rpc.command_client import CommandClient, new_command_id
from shoal_common.rpc.request_reply import RpcClient
from shoal_common.settings.ports import port_ranges
from shoal_inference.assignments import Assignment, successor_link
from shoal_inference.host_facts.bandwidth_estimate import BandwidthEstimate, bytes_read_per_token
from shoal_inference.host_facts.model_lease import lease_model
from shoal_inference.pending_requests import PendingRequests
from shoal_inference.stage.errors import LinkClosed
from shoal_inference.stage.ipc import messages
from shoal_inference.stage.ipc.parent import StageProcess

log = StructuredLogger("stage")

_FETCH_DEADLINE_S = 24 * 3600.0
_STABLE_AFTER_S = 30.0
_MAX_LOADS = 3
"""Attempts at files that do not load: a repair may be under way."""
_RESPAWN_BACKOFF = Backoff(0.2, 15.0)
"""A process that lived this long was healthy: its death counts as the first."""


class StageRunner:
    """Runs one assignment until it is cancelled; the only publisher of its `state.stage` key."""

    def __init__(
        self,
        assignment: Assignment,
        config: Config,
        nats: Nats,
        buckets: Buckets,
        state: KvMirror,
        interfaces: InterfaceMonitor,
        secrets: PeerSecrets,
        peer_links: PeerLinks,
        speed: BandwidthEstimate,
        ports: Sequence[int] = (0,),
    ) -> None:
        self.assignment, self._interfaces, self._speed = assignment, interfaces, speed
        self._ports = ports
        self._secrets, self._peer_links = secrets, peer_links
        self._config, self._nats, self._bucket, self._state_mirror = config, nats, buckets.state, state
        self._commands, self._rpc, self._peer_failures = (
            CommandClient(nats, buckets),
            RpcClient(nats),
            PeerFailureReporter(nats, config.node),
        )
        self._spec, self._stage = assignment.spec, assignment.stage
        self._key = stage_key(self._spec.id, self._stage.rank)
        self._state = StageState(
            instance=self._spec.id,
            rank=self._stage.rank,
            node=config.node,
            epoch=self._spec.epoch,
            phase="fetching",
        )
        self._published: StageState | None = None
        self._process: StageProcess | None = None
        self._pending = PendingRequests(self._spec.id)
        self._kill_reason: ShoalError | None = None
        self._fatal: ErrorBody | None = None
        """Why the process ends, as it has reported."""
        self._link_error: ErrorBody | None = None
        """Why the next stage cannot be connected to."""

    @property
    def pid(self) -> int | None:
        """The pid of the stage's process; None while there is none."""
        process = self._process
        return None if process is None else process.pid

    @property
    def ready(self) -> bool:
        """Whether the stage is loaded and connected to both its neighbours."""
        return self._state.phase == "ready"

    async def run(self) -> None:
        """Fetch, load and serve; restart after each death of the process, with back-off. Ends by cancellation.

        A model that this version does not support is tried once, one whose files do not load a few times.
        """
        deaths = loads = 0
        loop = asyncio.get_running_loop()
        while True:
            started_s = loop.time()
            try:
                await self._fetch()
                await self._run_process()
            except ShoalError as e:
                error = e
            if self._kill_reason is not None:
                error = self._kill_reason
            deaths = 1 if loop.time() - started_s > _STABLE_AFTER_S else deaths + 1
            loads = loads + 1 if isinstance(error, LoadError) else 0
            if loads == _MAX_LOADS:
                error = LoadError(f"{error.message}; tried {loads} times: repair the model, then place it again")
            log.warning(
                "stage ended",
                instance=self._spec.id,
                rank=self._stage.rank,
                reason=error.message,
                deaths=deaths,
            )
            self._pending.fail_all(error)
            await self._publish_state(phase="failed", error=error.body(), address="", links=[], uid="")
            if self._kill_reason is not None or isinstance(error, Unsupported) or loads == _MAX_LOADS:
                # Another attempt would fail in the same way: wait until the instance is stopped or moved, which
                # cancels this task.
                await asyncio.Event().wait()
            await asyncio.sleep(_RESPAWN_BACKOFF.delay_s(deaths))

    def kill_for_memory(self, error: ShoalError) -> None:
        """Kill the process, if there is one, and do not restart it: the machine needs the memory."""
        if self.pid is not None and self._kill_reason is None:
            self._kill_reason = error
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    async def publish_again(self) -> None:
        """Publish the stage's state again, which NATS has lost."""
        if self._published is not None:
            self._published = None
            await self._publish_state()

    async def unpublish(self) -> None:
        """Unpublish the stage."""
        await self._bucket.delete(self._key)

    # Life of one process

    async def _fetch(self) -> None:
        """Download what this stage needs of the model, unless this node has it. Raises if the download fails."""
        node, model = self._config.node, self._spec.model
        layers = [self._stage.first_layer, self._stage.last_layer]
        if self._state_mirror.get(model_key(node, model), ModelState) is not None:
            return
        shard = self._state_mirror.get(shard_key(node, model), ShardState)
        if shard is not None and covers(shard.layers, layers):
            return
        await self._publish_state(phase="fetching", error=None)
        command = downloads.DownloadCommand(
            model=model, layers=layers, deadline_s=_FETCH_DEADLINE_S, keep_paused=True
        )
        outcome = await self._commands.send("fetcher", node, "download", command, new_command_id(), _FETCH_DEADLINE_S)
        if outcome.error is not None:
            raise from_body(outcome.error)

    async def _run_process(self) -> None:
        """Start a process and handle its events until it ends. Raises why it ended."""
        self._fatal = self._link_error = None
        await self._publish_state(phase="loading", error=None, uid=uuid.uuid4().hex[:8])
        spec, stage = self._spec, self._stage
        # The process always ends before its lease does.
        async with (
            lease_model(self._rpc, self._config.node, self.assignment) as lease,
            await StageProcess.spawn() as process,
        ):
            await self._send(
                process,
                messages.Start(
                    instance=spec.id,
                    epoch=spec.epoch,
                    rank=stage.rank,
                    stages=len(spec.stages),
                    nodes=tuple(planned.node for planned in spec.stages),
                    model_dir=lease.view,
                    lock=lease.lock,
                    leaves=lease.leaf_ranges,
                    first_layer=stage.first_layer,
                    last_layer=stage.last_layer,
                    context_tokens=spec.context_tokens,
                    max_parallel_answers=spec.constraints.max_parallel_answers,
                    max_requests=max(spec.constraints.max_parallel_answers, MAX_REQUESTS_PER_INSTANCE),
                    bind_host=self._config.bind,
                    ports=tuple(self._ports),
                    successor_secret=self._secret_of(stage.rank + 1),
                    predecessor_secret=self._secret_of(stage.rank - 1),
                    tls=_stage_tls(self._config.identity),
                    is_encrypted=self._is_encrypted,
                ),
            )
            self._process = process
            linking = asyncio.create_task(self._keep_linked(process))
            try:
                async for event in process:
                    await self._handle_event(event)
            finally:
                self._process = None
                linking.cancel()
        status = await process.wait()
        if self._fatal is not None:
            raise from_body(self._fatal)
        exit_text = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        raise StageLost(f"stage {stage.rank} of {spec.id} on node {self._config.node} died: {exit_text}")

    @property
    def _is_encrypted(self) -> bool:
        return self._config.identity is not None and not is_loopback(self._config.bind)

    def _secret_of(self, rank: int) -> bytes:
        """Return the instance's secret with the node of a neighbour. Raises Denied if that is no member."""
        neighbour = self._spec.stages[rank % len(self._spec.stages)].node
        return mac_of(self._secrets.shared_with(neighbour), f"activations/{self._spec.id}").encode()

    async def _keep_linked(self, process: StageProcess) -> None:
        """Send the process its successor's address, now and at every change."""
        if len(self._spec.stages) == 1:
            return
        sent: NodeAddress | None = None
        node = self._spec.stages[(self._stage.rank + 1) % len(self._spec.stages)].node
        while True:
            version = self._state_mirror.changes
            states = (s for _, s in self._state_mirror.items(f"stage.{self._spec.id}.", StageState))
            link, error = None, None
            try:
                link = successor_link(
                    self._spec, self._stage.rank, states, self._peer_links.is_usable, self._interfaces.current
                )
            except Unavailable as e:
                error = e.body()
            if error != self._link_error:
                await self._note_link_error(error)
            if link is not None and link != sent:
                host, _, port = link.address.rpartition(":")
                _, hostname = self._peer_links.tls(node, link) or (None, "")
                await self._send(
                    process,
                    messages.SetSuccessor(host=host.strip("[]"), port=int(port), server_hostname=hostname),
                )
                sent = link
            await self._state_mirror.wait_changed(version)

    async def _note_link_error(self, error: ErrorBody | None) -> None:
        self._link_error = error
        if error is not None:
            log.warning(
                "next stage has no usable link",
                instance=self._spec.id,
                rank=self._stage.rank,
                reason=error.message,
            )
        if self._state.phase == "linking":
            await self._publish_state(error=error)

    async def _send(self, process: StageProcess, message: messages.ToChild) -> None:
        try:
            await process.send(message)
        except LinkClosed as e:
            raise StageLost(str(e)) from e

    async def _handle_event(self, event: messages.FromChild) -> None:
        match event:
            case messages.Listening(port=port):
                interfaces = self._interfaces.current
                if port and port not in self._ports and self._ports[0]:
                    log.warning("the ports for stages are taken", taken=port_ranges(self._ports), port=port)
                links = non_loopback(self._config.links(port, interfaces, tls=self._is_encrypted)) if port else []
                self._state = structs.replace(self._state, links=links, address=links[0].address if links else "")
            case messages.Loaded():
                is_only_stage = len(self._spec.stages) == 1
                await self._publish_state(
                    phase="ready" if is_only_stage else "linking",
                    weight_bytes=event.weight_bytes,
                    error=self._link_error,
                )
                log.info(
                    "stage loaded",
                    instance=self._spec.id,
                    rank=self._stage.rank,
                    weight_bytes=event.weight_bytes,
                    load_s=round(event.load_s, 2),
                )
            case messages.Linked():
                log.info("stage linked", instance=self._spec.id, rank=self._stage.rank)
                await self._publish_state(phase="ready", error=None)
            case messages.Unlinked(reason=reason, rank=rank):
                peer = self._spec.stages[rank].node if rank < len(self._spec.stages) else "-"
                log.warning(
                    "stage lost a neighbour",
                    instance=self._spec.id,
                    rank=self._stage.rank,
                    peer_rank=rank,
                    peer_node=peer,
                    reason=reason,
                )
                lost = StageLost(f"the connection to stage {rank} on node {peer} is lost: {reason}")
                await self._publish_state(phase="linking", error=self._link_error or lost.body())
                if rank < len(self._spec.stages):
                    await self._peer_failures.report(peer, reason)
            case messages.RequestAccepted(accepted=accepted):
                self._pending.accept(accepted)
            case messages.RequestEvent(event=token_event):
                await self._publish(token_event)
            case messages.PassTiming(pass_s=pass_s):
                self._record_pass_time(pass_s)
            case messages.Fatal(error=error):
                self._fatal = error
            case _:
                log.debug("stage event ignored", event=type(event).__name__)

    def _record_pass_time(self, pass_s: float) -> None:
        # Where this node holds only a shard, the model's shape may be published by another node.
        models = (m for _, m in self._state_mirror.items("model.", ModelState) if m.model == self._spec.model)
        shape = next((m.shape for m in models if m.shape is not None), None)
        if shape is not None:
            self._speed.add_sample(
                bytes_read_per_token(shape, self._stage.first_layer, self._stage.last_layer), pass_s
            )

    # Requests

    async def generate(self, request: Generate) -> Accepted:
        """Start an answer; its tokens follow on their subject. Raises what the stage answers."""
        process = self._process
        if process is None or not self.ready:
            raise StageLost(
                f"instance {self._spec.id} is not ready: stage {self._stage.rank} on node {self._config.node} is "
                f"{self._state.phase}; try again when `shoal ps` shows it ready"
            )
        return await self._pending.send(request, lambda: self._send(process, messages.StartRequest(generate=request)))

    async def cancel(self, request: str) -> None:
        """Cancel an answer; does nothing where the stage has no process."""
        if self._process is not None:
            with suppress(StageLost):
                await self._send(self._process, messages.Cancel(request=request))

    async def _publish(self, event: TokenEvent) -> None:
        if self._pending.refuse(event):
            return
        # Core NATS keeps nothing: a reader that is not subscribed now never gets it.
        with suppress(NatsError):
            await self._nats.client.publish(subjects.tokens(event.request), encode(event))

    async def _publish_state(self, **changes: object) -> None:
        self._state = structs.replace(self._state, **changes)
        if self._state != self._published:
            self._published = self._state
            await self._bucket.put(self._key, self._state)


def _stage_tls(identity: NodeIdentity | None) -> messages.StageTls | None:
    if identity is None:
        return None
    return messages.StageTls(
        authority=identity.authority,
        certificate_file=str(identity.certificate_file),
        key_file=str(identity.key_file),
    )
