"""What is asked of nodes' disks: how they stand, their settings, a dry run, pins, garbage, verification."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import msgspec
from rich.console import RenderableType

from shoal_cli.client.answers import Anything, CollectedRow, ConfiguredRow, DisksAnswer, PinnedRow, VerifiedRow
from shoal_cli.client.gateway import Gateway
from shoal_cli.client.tables import disks_table, part_words, strange_words
from shoal_cli.sizes import parse_limit, parse_size, show_bytes, show_seconds
from shoal_common.errors import BadInput, Corrupt, NotFound
from shoal_common.messages.questions import EvictionPlan
from shoal_common.messages.records import FurtherRootState, LeaseState, RootState
from shoal_common.names import ModelRef, check_node
from shoal_common.spans import parse_seconds

_VERIFY_ANSWER_S = 3700.0
"""The gateway waits an hour for a verification; its answer comes after that."""


class Said(msgspec.Struct, frozen=True):
    """What a command ends with: the API's answer for `--json`, words for a person, and the exit code."""

    answer: Anything
    words: list[str]
    table: RenderableType | None = None
    exit_code: int = 0


def storage(gateway: Gateway, args: argparse.Namespace) -> Said:
    """`shoal storage`, with what stands after it."""
    actions: dict[str, Callable[[Gateway, argparse.Namespace], Said]] = {
        "show": _show,
        "set": _set,
        "plan": _plan,
        "pin": lambda g, a: _pin(g, a, True),
        "unpin": lambda g, a: _pin(g, a, False),
    }
    return actions[getattr(args, "action", None) or "show"](gateway, args)


def collect_garbage(gateway: Gateway, args: argparse.Namespace) -> Said:
    """`shoal gc`"""
    answer = gateway.post("/v1/storage/gc", where(args), Anything)
    words = []
    for node, row in rows(answer, CollectedRow):
        freed = f"removed {count(row.blobs, 'blob')}, {show_bytes(row.freed_bytes)} freed"
        words.append(f"{node}: {freed if row.blobs or row.freed_bytes else 'nothing to remove'}")
    return Said(answer, words)


def verify(gateway: Gateway, args: argparse.Namespace) -> Said:
    """`shoal verify`: its exit code says whether all is intact."""
    answer, words, lost = look_again(gateway, args), [], False
    for node, row in verified_rows(answer):
        words.append(verified_words(node, row))
        words += [f"  {m} is no longer whole: `shoal repair {m} --node {node}` brings it back" for m in row.models]
        words += instance_words(row)
        lost = lost or bool(row.corrupt or row.missing)
    return Said(answer, words, exit_code=Corrupt.exit_code if lost else 0)


def look_again(gateway: Gateway, args: argparse.Namespace) -> Anything:
    """Have what a command line means hashed again. Returns when all of it has been."""
    body = where(args)
    if args.model:
        body["model"] = _model(args.model)
    return gateway.post("/v1/storage/verify", body, Anything, answer_s=_VERIFY_ANSWER_S)


def verified_rows(answer: Anything) -> list[tuple[str, VerifiedRow]]:
    """What each node has found."""
    return rows(answer, VerifiedRow)


def instance_words(row: VerifiedRow) -> list[str]:
    """Which instances are in doubt."""
    return [f"  instance {i} may have loaded wrong bytes: `shoal stop {i}`" for i in row.instances]


def verified_words(node: str, row: VerifiedRow) -> str:
    """What a node has found, on one line."""
    checked = f"{node}: checked {count(row.checked, 'blob')}, {show_bytes(row.checked_bytes)}"
    bad = f" ({count(row.bad_leaves, 'bad leaf')})" if row.bad_leaves else ""
    found = [f"{len(row.corrupt)} corrupt and set aside{bad}"] if row.corrupt else []
    found += [f"{len(row.missing)} missing"] if row.missing else []
    return f"{checked}: {', '.join(found) or 'all intact'}"


def _show(gateway: Gateway, args: argparse.Namespace) -> Said:
    answer = only_meant(gateway.get("/v1/storage", Anything), args)
    disks = msgspec.convert(answer, DisksAnswer).nodes
    words = []
    for row in disks:
        if row.storage is None:
            continue
        if row.storage.free_bytes == 0:
            words.append(f"{row.node}'s disk is full: `shoal rm` or `shoal gc` frees some space")
        if row.storage.reserved_bytes:
            words.append(f"{row.node} has promised {show_bytes(row.storage.reserved_bytes)} to downloads")
        for model, kept_bytes in row.storage.paused.items():
            words.append(f"{row.node} keeps {show_bytes(kept_bytes)} for {model}, whose download is paused")
        words += [f"{row.node} has bytes of {model}, whose download has ended" for model in row.storage.unfinished]
        words += [f"{row.node} has {part_words(part)}" for part in row.parts]
        words += [f"{row.node} keeps {model}: pinned" for model in row.storage.pinned]
        words += [f"{row.node}: {_leased(lease, time.time())}" for lease in row.storage.leases]
        words += [f"{row.node} has set aside {blob[:16]}…: corrupt" for blob in row.storage.quarantined]
        words += strange_words(row.node, row.storage)
        words += [f"{row.node} {further_words(further)}" for further in row.storage.roots]
        for root in row.storage.read_only_roots:
            words += [f"{row.node} {line}" for line in root_words(root)]
        words += [f"{row.node}: the environment holds {name}" for name in row.storage.from_environment]
    return Said(answer, words, table=disks_table(disks))


def only_meant(answer: Anything, args: argparse.Namespace) -> Anything:
    """Of what GET /v1/storage says, the nodes that a command line means: one, the gateway's own, or all."""
    if _everywhere(args):
        return answer
    node = _node(args) or str(answer.get("node", ""))
    shown = [n for n in answer.get("nodes", []) if n.get("node") == node]
    if not shown:
        known = ", ".join(str(n.get("node")) for n in answer.get("nodes", []))
        raise NotFound(f"no storage of node {node} is known (known: {known or 'none'}); see `shoal status`")
    return {**answer, "nodes": shown}


def _leased(lease: LeaseState, now_s: float) -> str:
    who = f"{lease.holder} (pid {lease.pid})" if lease.pid else lease.holder
    return f"{lease.model} is in use by {who}, for {show_seconds(max(now_s - lease.since_s, 0))}"


def further_words(root: FurtherRootState) -> str:
    """A further root for a person. Pure."""
    if root.error:
        return f"cannot use {root.path}: {root.error}"
    words = f"has {count(root.blob_count, 'blob')} in {root.path}, {show_bytes(root.used_bytes)}; "
    words += f"{show_bytes(root.free_bytes)} free there, {show_bytes(root.headroom_bytes)} of it kept free"
    if root.reserved_bytes:
        words += f", {show_bytes(root.reserved_bytes)} promised"
    if root.double_bytes:
        words += f"; {show_bytes(root.double_bytes)} are there once too often: `shoal gc` removes them"
    return words


def root_words(root: RootState) -> list[str]:
    """A read-only root for a person. Pure."""
    if root.error:
        return [f"cannot offer what is in {root.path}: {root.error}"]
    words = [f"offers {count(root.model_count, 'model')} of {root.path}"]
    if root.waiting_count:
        words.append(f"has yet to hash {count(root.waiting_count, 'model')} there, {show_bytes(root.waiting_bytes)}")
    words += [f"does not offer {directory}: {why}" for directory, why in root.not_adopted.items()]
    if (more := root.not_adopted_count - len(root.not_adopted)) > 0:
        words.append(f"does not offer {more} more of {root.path}; storage's log says why")
    return words


def _set(gateway: Gateway, args: argparse.Namespace) -> Said:
    body = where(args)
    if args.max_storage is not None:
        body["max_storage_bytes"] = parse_limit(args.max_storage)
    if args.eviction_policy is not None:
        body["eviction_policy"] = args.eviction_policy
    if args.headroom is not None:
        body["headroom_bytes"] = parse_size(args.headroom)
    if args.partial_retention is not None:
        body["partial_retention_s"] = parse_seconds(args.partial_retention)
    if args.read_only_roots is not None:
        body["read_only_roots"] = args.read_only_roots
    if args.add_roots or args.remove_roots:
        body["roots"] = _further_roots(gateway, args)
    if body.keys() <= {"node"}:
        raise BadInput(
            "nothing to set: give --max-storage, --eviction-policy, --headroom, --partial-retention, "
            "--read-only-root, --add-root or --remove-root"
        )
    answer = gateway.put("/v1/storage/config", body, Anything)
    words = []
    for node, row in rows(answer, ConfiguredRow):
        quota = "none" if row.max_storage_bytes is None else show_bytes(row.max_storage_bytes)
        headroom = show_bytes(row.headroom_bytes)
        words.append(f"{node}: quota {quota}, eviction policy {row.eviction_policy}, headroom {headroom}")
        if args.partial_retention is not None:
            words.append(f"  what ended downloads leave is kept for {show_seconds(row.partial_retention_s)}")
        words += [f"  read-only root {root}" for root in row.read_only_roots]
        words += [f"  further root {root}" for root in row.roots]
        words += [f"  {row.note}"] if row.note else []
    return Said(answer, words)


def _further_roots(gateway: Gateway, args: argparse.Namespace) -> list[str]:
    """All further roots that a node is to have."""
    if _everywhere(args):
        raise BadInput("--add-root and --remove-root are of one node: give --node, or none for this one")
    answer = gateway.get("/v1/storage", Anything)
    node = _node(args) or str(answer.get("node", ""))
    rows = [row for row in msgspec.convert(answer, DisksAnswer).nodes if row.node == node and row.storage]
    if not rows:
        raise NotFound(f"no storage of node {node} is known; see `shoal status`")
    roots = [root.path for row in rows if row.storage for root in row.storage.roots]
    for root in args.remove_roots or []:
        if root not in roots:
            raise BadInput(f"{root} is no further root of {node} (they are: {', '.join(roots) or 'none'})")
        roots.remove(root)
    return [*roots, *(root for root in args.add_roots or [] if root not in roots)]


def _plan(gateway: Gateway, args: argparse.Namespace) -> Said:
    need_bytes = parse_size(args.need)
    answer = gateway.get("/v1/storage/plan", Anything, need_bytes=str(need_bytes), **where(args))
    words: list[str] = []
    for node, plan in rows(answer, EvictionPlan):
        words += plan_words(node, need_bytes, plan, time.time())
    return Said(answer, words)


def plan_words(node: str, asked_bytes: int, plan: EvictionPlan, now_s: float) -> list[str]:
    """A dry run for a person. Pure."""
    room = f"room for {show_bytes(asked_bytes)}"
    if plan.need_bytes <= 0:
        return [f"{node}: there is {room} already; nothing would go"]
    need = show_bytes(plan.need_bytes)
    if not plan.enough:
        words = [f"{node}: cannot make {room}: {need} would have to go and {show_bytes(plan.evictable_bytes)} may"]
        return words + [f"  keeps {model}: {why}" for model, why in sorted(plan.kept.items())]
    words = [f"{node}: to make {room}, {need} have to go; these would, {show_bytes(plan.frees_bytes)} in all:"]
    if plan.garbage:
        words.append(f"  {count(len(plan.garbage), 'blob')} of no model, {show_bytes(plan.garbage_bytes)}")
    for left in plan.unfinished:
        words.append(f"  what is here of {left.model}, {show_bytes(left.frees_bytes)}; its download has ended")
    for victim in plan.victims:
        ago = f"last used {show_seconds(max(now_s - victim.last_use_s, 0))} ago"
        words.append(f"  {victim.model}, {show_bytes(victim.frees_bytes)}, {ago}")
    return words


def _pin(gateway: Gateway, args: argparse.Namespace, pinned: bool) -> Said:
    model = _model(args.model)
    body = {**where(args), "model": model, "pinned": pinned}
    answer = gateway.post("/v1/storage/pins", body, Anything)
    now = "is pinned: never evicted or deleted" if pinned else "is no longer pinned"
    words = []
    for node, row in rows(answer, PinnedRow):
        words += [f"{node}: {m} {now}" for m in row.models] or [f"{node}: {model} {now}"]
    return Said(answer, words)


def rows(answer: Anything, kind: type[Any]) -> list[tuple[str, Any]]:
    """What each node answers, as `kind`."""
    return [(node, msgspec.convert(row, kind)) for node, row in answer.get("nodes", {}).items()]


def where(args: argparse.Namespace) -> dict[str, Any]:
    """The node that is meant; nothing: the gateway's own."""
    node = "all" if _everywhere(args) else _node(args)
    return {"node": node} if node else {}


def _everywhere(args: argparse.Namespace) -> bool:
    everywhere = bool(getattr(args, "everywhere", False))
    if everywhere and _node(args):
        raise BadInput("--node and --all say different things: give one of them")
    return everywhere


def _node(args: argparse.Namespace) -> str:
    node = getattr(args, "node", "")
    return check_node(node) if node else ""


def _model(text: str) -> str:
    # As it was given: without a revision all of the repo are meant, which the short form of a ref cannot say.
    ModelRef.parse(text)
    return text


def count(number: int, what: str) -> str:
    """`1 blob`, `2 leaves`."""
    if number == 1:
        return f"1 {what}"
    return f"{number} {what.removesuffix('f')}ves" if what.endswith("leaf") else f"{number} {what}s"
