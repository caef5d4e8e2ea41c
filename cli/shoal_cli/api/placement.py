"""Placing a model, and waiting until its instance answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from shoal_cli.api.client import GatewayClient
from shoal_cli.api.schema import InstancesView
from shoal_cli.render.tables import instance_status_text
from shoal_common.errors import Expired, InternalError, NodeDown, NoMemory, NotFound, Refused, ShoalError, from_body
from shoal_common.liveness.down_text import down_texts
from shoal_common.messages.views import InstanceView, StatusView
from shoal_common.names import DEFAULT_REVISION, ModelRef

POLL_INTERVAL_S = 0.3
READY_DEADLINE_S = 600.0

_WARNINGS = {
    "tight": "it fits only if other programs free memory: the nodes may swap, and answers take longer",
    "force": "no memory is reserved for the system: the instance is stopped when a node runs out of memory",
}


def placement_request(
    model: str, exactly: int | None, at_least: int | None, nodes: Sequence[str], context_tokens: int
) -> dict[str, Any]:
    """Return the body of POST /v1/instances."""
    body: dict[str, Any] = {"model": str(ModelRef.parse(model)), "wait": False}
    if exactly:
        body |= {"min_nodes": exactly, "max_nodes": exactly}
    elif at_least:
        body["min_nodes"] = at_least
    if nodes:
        body["nodes"] = list(nodes)
    if context_tokens:
        body["context_tokens"] = context_tokens
    return body


def preview_query(body: dict[str, Any]) -> dict[str, str]:
    """Return the same as query parameters of a preview, which ignores what memory may be used."""
    ignored = ("wait", "allow_low_memory", "force")
    return {k: ",".join(v) if isinstance(v, list) else str(v) for k, v in body.items() if k not in ignored}


def place(
    gateway: GatewayClient,
    body: dict[str, Any],
    report: Callable[[str], None],
    confirm: Callable[[str], bool] | None = None,
) -> InstanceView:
    """Place a model and return its instance once it is ready; `report` is given each change of its status.

    `confirm`, where there is a person to ask: called when the placement was refused and low memory would allow it.
    """
    try:
        instance = gateway.post("/v1/instances", body, InstanceView)
    except NoMemory as e:
        if e.details.get("tier") != "tight" or confirm is None:
            raise
        if not confirm(f"{e.message}\nPlace it anyway? [y/N] "):
            raise
        instance = gateway.post("/v1/instances", {**body, "allow_low_memory": True}, InstanceView)
    if instance.tier in _WARNINGS:
        report(f"warning: {_WARNINGS[instance.tier]}")
    return wait_ready(gateway, instance, report)


def wait_ready(gateway: GatewayClient, instance: InstanceView, report: Callable[[str], None]) -> InstanceView:
    """Return an instance once it is ready. Raises the error it failed with, NodeDown or Expired."""
    give_up_s = time.monotonic() + READY_DEADLINE_S
    reported = ""
    while instance.phase != "ready":
        if instance.phase == "failed":
            if instance.error is not None:
                raise from_body(instance.error)
            raise InternalError(f"instance {instance.id} failed; see `shoal logs inference`")
        if down := nodes_down(instance):
            raise NodeDown(
                f"instance {instance.id} cannot answer: {down_texts(down)}; bring it back with `shoal up` there, or "
                f"move the instance with `shoal rebalance {instance.id}`",
                instance=instance.id,
                down_since_s=down,
            )
        if time.monotonic() > give_up_s:
            raise Expired(
                f"instance {instance.id} is still {instance_status_text(instance)} after {READY_DEADLINE_S:.0f} s; "
                f"it goes on starting: see `shoal ps`, or stop it with `shoal stop {instance.id}`"
            )
        status = f"instance {instance.id}: {instance_status_text(instance)}"
        if status != reported:
            report(status)
            reported = status
        time.sleep(POLL_INTERVAL_S)
        instance = gateway.get(f"/v1/instances/{instance.id}", InstanceView)
    return instance


def nodes_down(instance: InstanceView) -> dict[str, float]:
    """Return the nodes of an instance that are down, with since when; 0 where that is not known."""
    return {s.node: s.down_since_s or 0.0 for s in instance.stages if s.phase == "down"}


def wait_ready_or_move(
    gateway: GatewayClient, instance: InstanceView, body: dict[str, Any], report: Callable[[str], None]
) -> InstanceView:
    """Return an instance once it is ready; if a node of it is down, first move it to nodes that are up.

    Where its own constraints allow no other nodes, the model is placed once more by `body`. Raises NodeDown if that
    is not possible either.
    """
    try:
        return wait_ready(gateway, instance, report)
    except NodeDown as lost:
        if "down_since_s" not in lost.details:
            raise
        report(f"{lost.message.partition(';')[0]}: moving it")
        try:
            moved = gateway.post(f"/v1/instances/{instance.id}/rebalance", {}, InstanceView)
        except (Refused, NotFound):
            try:
                moved = gateway.post("/v1/instances", body, InstanceView)
            except ShoalError as e:
                message = f"{lost.message.partition(';')[0]}, and it cannot run on other nodes: {e.message}"
                raise NodeDown(message, **lost.details) from None
        return wait_ready(gateway, moved, report)


def find_instance(
    gateway: GatewayClient, ref: ModelRef, status: StatusView, exactly: int | None
) -> InstanceView | None:
    """Return an instance of this model, over exactly so many nodes if given.

    A ready one, else one that is starting, else one that lacks a node.
    """
    commits = {m.commit for m in status.models if m.repo == ref.repo and matches_revision(m.commit, ref)}
    usable = [
        i
        for i in gateway.get("/v1/instances", InstancesView).instances
        if i.repo == ref.repo
        and i.phase != "failed"
        and exactly in (None, len(i.nodes))
        and (matches_revision(i.commit, ref) or i.commit in commits)
    ]
    return min(usable, key=lambda i: (i.phase != "ready", bool(nodes_down(i))), default=None)


def matches_revision(commit: str, ref: ModelRef) -> bool:
    """Return whether a commit is what a reference names, as far as can be told here: for a tag it cannot."""
    return ref.revision in (DEFAULT_REVISION, commit)
