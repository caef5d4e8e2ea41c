"""Turn the outcomes of commands, by node, into errors and results. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal_common.errors import ShoalError, from_body
from shoal_common.messages.commands import Outcome


def with_details(error: ShoalError, **details: Any) -> ShoalError:
    """Return the same error with more details."""
    return type(error)(error.message, **{**error.details, **details})


def error_of(outcome: Outcome) -> ShoalError | None:
    """Return the error of an outcome, with the node and the command in its details; None for a success."""
    if outcome.ok or outcome.error is None:
        return None
    return with_details(from_body(outcome.error), node=outcome.node, command=outcome.id)


def raise_first_error(outcomes: Mapping[str, Outcome]) -> None:
    """Raise the first node's error, if any; its details say which other nodes succeeded."""
    for node, outcome in sorted(outcomes.items()):
        error = error_of(outcome)
        if error is not None:
            others = {n: o.ok for n, o in outcomes.items() if n != node}
            raise with_details(error, other_nodes_ok=others) if others else error


def results(outcomes: Mapping[str, Outcome]) -> dict[str, dict[str, Any]]:
    """Return each node's result, with the command's id."""
    return {node: {**outcome.result, "command": outcome.id} for node, outcome in sorted(outcomes.items())}
