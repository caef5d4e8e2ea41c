"""`shoal repair`: verify, then pull the broken models again on their nodes. What is good of them is not fetched."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import msgspec

from shoal_cli.client.answers import Anything, VerifiedRow
from shoal_cli.client.disks import Said, count, instance_words, look_again, verified_rows, verified_words
from shoal_cli.client.gateway import Gateway
from shoal_cli.client.pull import Pull, Shown
from shoal_cli.sizes import show_bytes
from shoal_common.errors import ShoalError


class Repaired(msgspec.Struct):
    """What was done on one node."""

    models: list[str] = []
    fetched_bytes: int = 0
    errors: dict[str, ShoalError] = {}
    """What went wrong, by model."""


def repair(gateway: Gateway, args: argparse.Namespace, shown: Shown, say: Callable[[str], None]) -> Said:
    """Find what is corrupt and bring it back, node by node and model by model; `say` hears what was found at once.

    The exit code is that of the first model that could not be repaired.
    """
    answer = look_again(gateway, args)
    words, codes = list[str](), list[int]()
    for node, row in verified_rows(answer):
        say(verified_words(node, row))
        done = Repaired()
        for model in row.broken:
            _pull(gateway, node, model, shown, done)
        words += [*repair_words(node, row, done), *instance_words(row)]
        answer["nodes"][node] |= _as_answer(done)
        codes += [e.exit_code for e in done.errors.values()]
    return Said(answer, words, exit_code=codes[0] if codes else 0)


def _pull(gateway: Gateway, node: str, model: str, shown: Shown, done: Repaired) -> None:
    pull = Pull(gateway, model)
    try:
        pull.ask([node], everywhere=False)
        pull.follow(shown)
    except ShoalError as e:
        done.errors[model] = e
        return
    if node in pull.errors:
        done.errors[model] = pull.errors[node]
    else:
        done.models.append(model)
    done.fetched_bytes += sum(pull.states[node].sources.values()) if node in pull.states else 0


def repair_words(node: str, row: VerifiedRow, done: Repaired) -> list[str]:
    """What was bad on a node and what came of it. Pure."""
    if not row.broken:
        return [f"{node}: nothing to repair"]
    bad = []
    if row.corrupt:
        bad.append(f"{count(row.bad_leaves, 'bad leaf')} in {count(len(row.corrupt), 'blob')}")
    if row.missing:
        bad.append(f"{count(len(row.missing), 'blob')} missing")
    found = ", ".join(bad) or "broken from before"
    words = [f"{node}: {found}; fetched {show_bytes(done.fetched_bytes)}"]
    words += [f"  {model} is whole again" for model in done.models]
    return words + [f"  {model} is still broken: {e.message}" for model, e in done.errors.items()]


def _as_answer(done: Repaired) -> Anything:
    return {
        "repaired": done.models,
        "fetched_bytes": done.fetched_bytes,
        "errors": {model: {"code": e.code, "message": e.message} for model, e in done.errors.items()},
    }
