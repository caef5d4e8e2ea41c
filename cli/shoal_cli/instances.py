"""The commands about what runs, and where it may."""

from __future__ import annotations

import sys

import msgspec

from shoal_cli.call import Call, print_json, read_as, shown
from shoal_cli.client import placing
from shoal_cli.client.answers import Anything, InstanceRow, MovedRow
from shoal_cli.client.tables import instances_table, previews_table, rebalances_table
from shoal_cli.client.typed import confirmed
from shoal_common.errors import BadInput
from shoal_common.messages.questions import Previews, Rebalances
from shoal_common.names import check_id, check_node


def place(call: Call) -> int:
    """`shoal place`: or a preview of what could be."""
    a = call.args
    nodes = [check_node(n) for n in a.nodes]
    body = placing.wish(a.model, a.exactly, a.at_least, nodes, a.context) | placing.finer(a)
    if a.preview:
        answer = call.gateway.get("/v1/placements/preview", Previews, **placing.as_query(body))
        return shown(call, answer, previews_table)
    ask = confirmed if sys.stdin is not None and sys.stdin.isatty() and not a.as_json else None
    instance: InstanceRow = placing.place(call.gateway, body, lambda words: print(words, file=sys.stderr), ask)
    if a.as_json:
        return print_json(msgspec.to_builtins(instance))
    call.say(f"instance {instance.id} is ready on {', '.join(instance.nodes)}")
    return 0


def ps(call: Call) -> int:
    """`shoal ps`."""
    answer = call.gateway.get("/v1/instances", Anything)
    if call.args.as_json:
        return print_json({"instances": answer.get("instances", [])})
    rows = [read_as(i, InstanceRow) for i in answer.get("instances", [])]
    if rows:
        call.out.print(instances_table(rows))
    else:
        call.say("nothing is running: `shoal run org/name` starts a model")
    return 0


def stop(call: Call) -> int:
    """`shoal stop`."""
    instance = check_id(call.args.instance)
    answer = call.gateway.delete(f"/v1/instances/{instance}", Anything)
    call.say(f"stopped {instance}" if answer.get("deleted", True) else f"{instance} was not running")
    return 0


def rebalance(call: Call) -> int:
    """`shoal rebalance`: what would stand better elsewhere, or moving one there."""
    if not call.args.instance:
        if call.args.layout:
            raise BadInput("which instance? `shoal rebalance INSTANCE --layout L`")
        return shown(call, call.gateway.get("/v1/placements/rebalances", Rebalances), rebalances_table)
    path = f"/v1/instances/{check_id(call.args.instance)}/rebalance"
    instance = call.gateway.post(path, {"layout": call.args.layout}, MovedRow)
    if instance.moved:
        placing.until_ready(call.gateway, instance, lambda words: print(words, file=sys.stderr))
    if call.args.as_json:
        return print_json(msgspec.to_builtins(instance))
    nodes = ", ".join(instance.nodes)
    call.say(f"instance {instance.id} is ready on {nodes}" if instance.moved else f"{instance.id} stays on {nodes}")
    return 0


def node(call: Call) -> int:
    """`shoal node`: drain one, or forget it."""
    node = check_node(call.args.node)
    if call.args.action == "drain":
        return _drain(call, node)
    answer = call.gateway.delete(f"/v1/nodes/{node}", Anything)
    count = answer.get("key_count", 0)
    keys = f"{count} {'key' if count == 1 else 'keys'}"
    call.say(f"forgot {node}: {keys} removed" if answer.get("found") else f"nothing names {node}")
    return 0


def _drain(call: Call, node: str) -> int:
    if call.args.undo:
        answer = call.gateway.delete(f"/v1/nodes/{node}/drain", Anything)
        call.say(f"{node} may work again" if answer.get("was_drained") else f"{node} was not drained")
        return 0
    answer = call.gateway.post(f"/v1/nodes/{node}/drain", {}, Anything)
    staying = ", ".join(answer.get("instances", []))
    call.say(
        f"drained {node}" + (f"; {staying} will move as far as other nodes have room: `shoal ps`" if staying else "")
    )
    return 0
