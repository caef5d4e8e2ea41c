"""Shell completion of names that the cluster knows. Where no gateway answers at once, nothing is offered."""

from __future__ import annotations

from typing import Any

import typer

from shoal_common.names import SERVICES

_DEADLINE_S = 1.0
"""Someone has pressed Tab and waits."""


def models(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the models that nodes hold."""
    return _matching(incomplete, [m.get("repo") for m in _status(ctx).get("models", [])])


def nodes(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the cluster's nodes."""
    return _matching(incomplete, [n.get("node") for n in _status(ctx).get("nodes", [])])


def instances(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the instances' ids and models."""
    return _matching(incomplete, [i.get(key) for i in _status(ctx).get("instances", []) for key in ("id", "repo")])


def services(incomplete: str) -> list[str]:
    """Return the services of a node."""
    return _matching(incomplete, list(SERVICES))


def children(incomplete: str) -> list[str]:
    """Return what a node's supervisor runs."""
    return _matching(incomplete, [*SERVICES, "nats"])


def logs(incomplete: str) -> list[str]:
    """Return the node's logs."""
    return _matching(incomplete, [*SERVICES, "nats", "supervisor"])


def _matching(incomplete: str, names: list[Any]) -> list[str]:
    return sorted({name for name in names if isinstance(name, str) and name.startswith(incomplete)})


def _status(ctx: typer.Context) -> dict[str, Any]:
    try:
        from shoal_cli.cli_context import CliContext  # noqa: PLC0415

        return CliContext(ctx).gateway.get("/v1/status", dict[str, Any], timeout_s=_DEADLINE_S)
    except Exception:  # noqa: BLE001  # whatever is wrong, the shell must show nothing
        return {}
