"""Placing a model and waiting until the instance answers."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

from shoal_cli.client.answers import InstanceRow, InstancesAnswer, StatusAnswer
from shoal_cli.client.gateway import Gateway
from shoal_cli.client.tables import how_it_stands
from shoal_common.errors import Expired, Failed, NoRoom, from_body
from shoal_common.names import DEFAULT_REVISION, ModelRef, check_node

POLL_S = 0.3
READY_DEADLINE_S = 600.0


def wish(
    model: str, exactly: int | None, at_least: int | None, nodes: Sequence[str], context_tokens: int
) -> dict[str, Any]:
    """The body of POST /v1/instances."""
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


def finer(args: argparse.Namespace) -> dict[str, Any]:
    """What else the body of POST /v1/instances says, as far as it was asked for."""
    asked = {
        "without": [check_node(node) for node in args.without],
        "objective": args.objective if args.objective != "latency" else "",
        "in_flight": args.in_flight,
        "answers": args.answers if args.answers != 1 else 0,
        "layout": args.layout,
        "allow_low_memory": args.allow_low_memory,
        "force": args.force,
    }
    return {name: value for name, value in asked.items() if value}


def as_query(body: dict[str, Any]) -> dict[str, str]:
    """The same as the parameters of a preview, for which it does not matter what memory is allowed."""
    leave = ("wait", "allow_low_memory", "force")
    return {k: ",".join(v) if isinstance(v, list) else str(v) for k, v in body.items() if k not in leave}


_WARNINGS = {
    "tight": "it fits only where other programs give memory back: the nodes may swap, and answers take longer",
    "force": "nothing is kept for the system: the instance is stopped when its nodes run out of memory",
}


def place(
    gateway: Gateway, body: dict[str, Any], tell: Callable[[str], None], ask: Callable[[str], bool] | None = None
) -> InstanceRow:
    """Place a model and return once its instance is ready, telling how it stands meanwhile.

    `ask`: a person, who is asked where it was refused and would do with low memory.
    """
    try:
        instance = gateway.post("/v1/instances", body, InstanceRow)
    except NoRoom as e:
        if e.details.get("tier") != "tight" or ask is None:
            raise
        if not ask(f"{e.message}\nPlace it all the same? [y/N] "):
            raise
        instance = gateway.post("/v1/instances", {**body, "allow_low_memory": True}, InstanceRow)
    if instance.tier in _WARNINGS:
        tell(f"warning: {_WARNINGS[instance.tier]}")
    return until_ready(gateway, instance, tell)


def until_ready(gateway: Gateway, instance: InstanceRow, tell: Callable[[str], None]) -> InstanceRow:
    """Return once an instance is ready. Raises what it failed with, or Expired."""
    give_up_s = time.monotonic() + READY_DEADLINE_S
    told = ""
    while instance.phase != "ready":
        if instance.phase == "failed":
            if instance.error is not None:
                raise from_body(instance.error)
            raise Failed(f"instance {instance.id} failed; see `shoal logs inference`")
        if time.monotonic() > give_up_s:
            raise Expired(
                f"instance {instance.id} is {how_it_stands(instance)} after {READY_DEADLINE_S:.0f} s; it goes on: "
                f"see `shoal ps`, or stop it with `shoal stop {instance.id}`"
            )
        words = f"instance {instance.id}: {how_it_stands(instance)}"
        if words != told:
            tell(words)
            told = words
        time.sleep(POLL_S)
        instance = gateway.get(f"/v1/instances/{instance.id}", InstanceRow)
    return instance


def find_instance(gateway: Gateway, ref: ModelRef, status: StatusAnswer) -> InstanceRow | None:
    """An instance of this model to use: a ready one, else one that is on its way."""
    commits = {m.commit for m in status.models if m.repo == ref.repo and is_held_as(m.commit, ref)}
    found = [
        i
        for i in gateway.get("/v1/instances", InstancesAnswer).instances
        if i.repo == ref.repo and i.phase != "failed" and (is_held_as(i.commit, ref) or i.commit in commits)
    ]
    return min(found, key=lambda i: i.phase != "ready", default=None)


def is_held_as(commit: str, ref: ModelRef) -> bool:
    """Whether a commit is what a reference names, as far as that can be told from here: a tag cannot."""
    return ref.revision in (DEFAULT_REVISION, commit)
