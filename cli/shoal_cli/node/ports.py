"""TCP ports of this machine: whether one is free, and a free one; and those that a node starts with."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable

from msgspec import structs

from shoal_cli.node.node_plan import NodePlan
from shoal_common.errors import BadInput, Refused
from shoal_common.host.listening import cannot_listen, has_address, holder_of, missing_address
from shoal_common.settings.declaration import Value
from shoal_common.settings.ports import CHOSEN_SECTION, port_ranges

_FIRST_PORT, _FIRST_DYNAMIC_PORT = 20000, 32768
_MAX_TRIES = 100


def bind_problem(bind: str, port: int) -> str | None:
    """Return the system's reason why nothing could listen there; None when it could. Port 0 always can."""
    try:
        with _bound(bind, port):
            return None
    except OSError as e:
        return e.strerror or str(e)


def free_port(bind: str) -> int:
    """Return a free port that no outgoing connection will be given before a server takes it.

    Outgoing connections get ports from the system's dynamic range (from 32768 on Linux, 49152 on macOS). A server
    that restarts there may find its port taken, even by a client that connects to itself while the server is down.
    """
    for port in random.sample(range(_FIRST_PORT, _FIRST_DYNAMIC_PORT), _MAX_TRIES):
        if bind_problem(bind, port) is None:
            return port
    with _bound(bind, 0) as s:
        return int(s.getsockname()[1])


def with_free_ports(plan: NodePlan, report: Callable[[str], None]) -> NodePlan:
    """Return the plan with a port in place of each that may be any; `changes` keeps those.

    A port that was chosen before is chosen again while it is free. Raises BadInput for an address that this machine
    lacks, Refused for a port that was set and is taken. Blocks.
    """
    if not has_address(plan.bind):
        raise BadInput(f"the node cannot listen: {missing_address(plan.bind)}; {plan.bind_source}")
    chosen: dict[str, Value] = {}
    gateway_port, nats_port = plan.gateway_port, plan.nats_port
    if "gateway" in plan.services:
        gateway_port = _port(plan, "gateway_port", gateway_port, report, chosen)
        _check_is_free("the gateway", plan.bind, [gateway_port], "choose another port with --port (0: any)")
    if plan.runs_nats:
        nats_port = _port(plan, "nats_port", nats_port, report, chosen)
    if "fileserver" in plan.services and plan.fileserver_port:
        remedy = "set SHOAL_FILESERVER_PORT or fileserver_port in node.toml to another port"
        _check_is_free("the fileserver", plan.fileserver_bind, [plan.fileserver_port], remedy)
    if "inference" in plan.services and plan.stage_ports:
        remedy = "set SHOAL_STAGE_PORT or stage_port in node.toml to another block"
        _check_is_free("stages", plan.bind, plan.stage_ports, remedy)
    changes = {**plan.changes, **({CHOSEN_SECTION: chosen} if chosen else {})}
    return structs.replace(plan, gateway_port=gateway_port, nats_port=nats_port, changes=changes)


def _port(plan: NodePlan, key: str, port: int, report: Callable[[str], None], chosen: dict[str, Value]) -> int:
    before = plan.chosen.get(key, 0)
    if port:
        if before:
            chosen[key] = None
        return port
    if before and (reason := bind_problem(plan.bind, before)) is None:
        return before
    chosen[key] = found = free_port(plan.bind)
    if before:
        report(
            f"port {before}, the {key} so far, is taken ({reason}): {holder_of(before)}; it is {found} from now on"
        )
    return found


def _check_is_free(what: str, bind: str, ports: list[int], remedy: str) -> None:
    """Raise Refused, naming who has the first port and what to do, when nothing could listen on any of them."""
    problems = []
    for port in ports:
        try:
            with _bound(bind, port):
                return
        except OSError as e:
            problems.append((port, e))
    port, error = problems[0]
    others = f" (nor on another of {port_ranges(ports)})" if len(ports) > 1 else ""
    raise Refused(cannot_listen(what, bind, port, error, f"stop that program, or {remedy}") + others, port=port)


def _bound(bind: str, port: int) -> socket.socket:
    s = socket.socket(socket.AF_INET6 if ":" in bind else socket.AF_INET, socket.SOCK_STREAM)
    try:
        # As servers do: old connections in TIME_WAIT do not keep a port taken.
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind((bind, port))
    except OSError:
        s.close()
        raise
    return s
