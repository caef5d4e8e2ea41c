"""REST: download, pause, resume, cancel."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from shoal_common.bus import cluster_clock
from shoal_common.bus.keys import download_key
from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.errors import InternalError, ShoalError, from_body
from shoal_common.messages import WireStruct
from shoal_common.messages.downloads import (
    ENDED_PHASES,
    CancelDownload,
    DownloadCommand,
    DownloadPhase,
    DownloadState,
    PauseDownload,
    ResumeDownload,
)
from shoal_common.messages.envelope import Outcome
from shoal_common.names import ModelRef
from shoal_common.rpc.command_client import new_command_id
from shoal_gateway.cluster.status_view import download_view, download_views
from shoal_gateway.context import GatewayContext, gateway_of
from shoal_gateway.rest.command_results import error_of, raise_first_error, results_by_node, with_details
from shoal_gateway.rest.http_json import cancel_on_disconnect, json_response, read_body_as
from shoal_gateway.rest.node_selection import NodeSelection, select_control_nodes, select_download_nodes
from shoal_gateway.rest.routing import route


class DownloadBody(WireStruct):
    """The body of `POST /v1/downloads`; the fields besides `nodes` and `wait` are those of the `download` command."""

    model: str
    nodes: NodeSelection = None
    wait: bool = False
    deadline_s: float = 0.0
    force: bool = False


class ControlBody(WireStruct):
    """The body of `POST /v1/downloads/pause` and `/resume`. Without a model it means all downloads of the nodes."""

    model: str = ""
    nodes: NodeSelection = None


class CancelBody(WireStruct):
    """The body of `POST /v1/downloads/cancel`."""

    model: str
    nodes: NodeSelection = None


class PendingDownload(msgspec.Struct, frozen=True):
    """A download requested from one node: its command id, and the published state before it."""

    node: str
    key: str
    command_id: str
    state_before: DownloadState | None
    requested_at_s: float


async def downloads(request: Request) -> Response:
    """`GET /v1/downloads`."""
    return json_response({"downloads": download_views(gateway_of(request).snapshot())})


async def download(request: Request) -> Response:
    """`POST /v1/downloads`: 202 once each has started, or with `wait` 200 once each has ended."""
    gateway, body = gateway_of(request), await read_body_as(request, DownloadBody)
    ref = ModelRef.parse(body.model)
    gateway.sender.require_nats()
    nodes = select_download_nodes(gateway.snapshot(), body.nodes, gateway.node)
    command = DownloadCommand(model=str(ref), deadline_s=body.deadline_s, force=body.force)
    pending = [_pending_download(gateway.state, node, command.model) for node in nodes]
    outcomes = await cancel_on_disconnect(request.receive, _send(gateway, command, pending, body.wait))
    commands = {a.node: a.command_id for a in pending}
    _raise_first_refusal(gateway.state, pending, outcomes, commands)
    return json_response(
        {"downloads": _views(gateway.state, pending), "commands": commands}, 200 if body.wait else 202
    )


async def pause(request: Request) -> Response:
    """`POST /v1/downloads/pause`."""
    body = await read_body_as(request, ControlBody)
    return await _control(request, "pause", PauseDownload(model=_name(body.model)), body.nodes)


async def resume(request: Request) -> Response:
    """`POST /v1/downloads/resume`."""
    body = await read_body_as(request, ControlBody)
    return await _control(request, "resume", ResumeDownload(model=_name(body.model)), body.nodes)


async def cancel(request: Request) -> Response:
    """`POST /v1/downloads/cancel`."""
    body = await read_body_as(request, CancelBody)
    return await _control(request, "cancel", CancelDownload(model=str(ModelRef.parse(body.model))), body.nodes)


def _name(model: str) -> str:
    return str(ModelRef.parse(model)) if model else ""


async def _control(
    request: Request, verb: str, command: PauseDownload | ResumeDownload | CancelDownload, nodes: NodeSelection
) -> Response:
    """Send a command to the chosen nodes' fetchers and return each one's result."""
    gateway = gateway_of(request)
    gateway.sender.require_nats()
    chosen = select_control_nodes(gateway.snapshot(), command.model, nodes)
    ids, deadline_s = {n: new_command_id() for n in chosen}, gateway.settings.timeouts.outcome_s
    sending = gateway.sender.send_to_all("fetcher", ids, verb, command, deadline_s)
    outcomes = await cancel_on_disconnect(request.receive, sending)
    raise_first_error(outcomes)
    return json_response({"model": command.model, "nodes": results_by_node(outcomes)})


def _pending_download(state: KvMirror, node: str, model: str) -> PendingDownload:
    key = download_key(node, model)
    return PendingDownload(node, key, new_command_id(), state.get(key, DownloadState), cluster_clock.now_s())


async def _send(
    gateway: GatewayContext, command: DownloadCommand, pending: list[PendingDownload], wait: bool
) -> dict[str, Outcome]:
    """Send to every node. Return the outcomes known once all have started, or with `wait` all outcomes."""
    if wait:
        async with asyncio.TaskGroup() as tasks:
            waiting = {a.node: tasks.create_task(_outcome(gateway, command, a)) for a in pending}
        return {node: task.result() for node, task in waiting.items()}
    # Tasks that have not finished when the response goes out keep running: they may have to resend or cancel.
    starting = {a.node: gateway.tasks.create_task(_until_begun(gateway, command, a)) for a in pending}
    await asyncio.wait(starting.values(), timeout=gateway.settings.timeouts.fetch_begins_s)
    ended = {node: task.result() for node, task in starting.items() if task.done() and not task.cancelled()}
    return {node: outcome for node, outcome in ended.items() if outcome is not None}


async def _outcome(gateway: GatewayContext, command: DownloadCommand, pending: PendingDownload) -> Outcome:
    deadline_s = command.deadline_s or gateway.settings.timeouts.download_s
    return await gateway.sender.send("fetcher", pending.node, "download", command, pending.command_id, deadline_s)


async def _until_begun(gateway: GatewayContext, command: DownloadCommand, pending: PendingDownload) -> Outcome | None:
    """Return the outcome, or None as soon as `state` shows that the download has started."""
    state, outcome = gateway.state, asyncio.create_task(_outcome(gateway, command, pending))
    try:
        while not outcome.done():
            version = state.changes
            if has_started(state.get(pending.key, DownloadState), pending.state_before, pending.requested_at_s):
                return None
            changed = asyncio.create_task(state.wait_changed(version))
            try:
                await asyncio.wait({changed, outcome}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                changed.cancel()
        return outcome.result()
    finally:
        outcome.cancel()


def _raise_first_refusal(
    state: KvMirror, pending: list[PendingDownload], outcomes: Mapping[str, Outcome], commands: dict[str, str]
) -> None:
    """Raise the error of the first node that refused or failed, from its outcome or its state."""
    for a in pending:
        now = state.get(a.key, DownloadState)
        since_request = now if has_started(now, a.state_before, a.requested_at_s) else None
        error: ShoalError | None = failure_of(outcomes.get(a.node), since_request)
        if error is not None:
            raise with_details(error, node=a.node, commands=commands)


def _views(state: KvMirror, pending: list[PendingDownload]) -> list[object]:
    states = [state.get(a.key, DownloadState) for a in pending]
    return [download_view(d) for d in states if d is not None]


ROUTES = [
    route("/v1/downloads", GET=downloads, POST=download),
    route("/v1/downloads/pause", POST=pause),
    route("/v1/downloads/resume", POST=resume),
    route("/v1/downloads/cancel", POST=cancel),
]
_WAITING: frozenset[DownloadPhase] = frozenset({"queued", "reserving"})
_BAD_ENDS: frozenset[DownloadPhase] = ENDED_PHASES - {"ready"}


def has_started(now: DownloadState | None, before: DownloadState | None, requested_at_s: float) -> bool:
    """Return whether a download has left its queue since it was requested.

    A state published before the request does not count, unless its node has confirmed it since. Nodes' clocks
    differ, so a changed state counts as well as one with a later time.
    """
    if now is None or now.phase in _WAITING:
        return False
    return now != before or max(now.updated_at_s, now.started_at_s) >= requested_at_s


def failure_of(outcome: Outcome | None, state: DownloadState | None) -> ShoalError | None:
    """Return the error of a download; None while it runs or when it is ready."""
    if outcome is not None:
        return error_of(outcome)
    if state is None or state.phase not in _BAD_ENDS:
        return None
    if state.error is not None:
        return from_body(state.error)
    return InternalError(
        f"the download of {state.model} on node {state.node} {state.phase}; see `shoal logs fetcher` there"
    )
