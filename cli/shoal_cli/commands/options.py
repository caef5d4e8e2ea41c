"""Option types that several commands share, and the rules between options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeVar

import typer

from shoal_cli.api.node_answers import NodeSelection
from shoal_cli.cli_context import option
from shoal_cli.commands import completion
from shoal_common.names import check_node

T = TypeVar("T", int, float)

MAX_COUNT = 1_000_000_000

HomeOption = Annotated[
    str, typer.Option("--home", metavar="DIR", show_default=False, help="the node's directory (SHOAL_HOME, ~/.shoal)")
]
GatewayOption = Annotated[
    str, typer.Option("--gateway", metavar="URL", show_default=False, help="another node's gateway (SHOAL_GATEWAY)")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON for programs")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="print names only, one a line")]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="org/name or org/name@revision; the name alone if the cluster has one such model",
        autocompletion=completion.models,
    ),
]
OptionalModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="[MODEL]", show_default=False, help="only this model; default: all", autocompletion=completion.models
    ),
]
InstanceArgument = Annotated[
    str,
    typer.Argument(
        metavar="INSTANCE", help="its id or its model; `shoal ps` lists them", autocompletion=completion.instances
    ),
]
NodeArgument = Annotated[
    str,
    typer.Argument(metavar="NODE", help="its id; `shoal status` lists them", autocompletion=completion.nodes),
]
NodeOption = Annotated[
    str,
    typer.Option(
        "--node",
        metavar="NODE",
        show_default=False,
        help="on this node; default: the local one",
        autocompletion=completion.nodes,
    ),
]
NodesOption = Annotated[
    list[str],
    typer.Option(
        "--node",
        metavar="NODE",
        show_default=False,
        help="on this node; repeatable; default: wherever it is downloading",
        autocompletion=completion.nodes,
    ),
]
AllNodesOption = Annotated[bool, typer.Option("--all", help="on every node that is up")]


def select_nodes(ctx: typer.Context) -> NodeSelection:
    """Return the nodes that `--node` and `--all` select, wherever typed. Both together are a usage error."""
    node, all_nodes = option(ctx, "node") or "", bool(option(ctx, "all_nodes"))
    if node and all_nodes:
        ctx.fail("--all is not allowed with --node: give one of them")
    return NodeSelection(check_node(node) if node else "", all_nodes)


def reject_together(ctx: typer.Context, **given: object) -> None:
    """End as a usage error when more than one of these options was given; `min_nodes=…` is `--min-nodes`."""
    names = [f"--{name.replace('_', '-')}" for name, value in given.items() if value]
    if len(names) > 1:
        ctx.fail(f"{names[1]} is not allowed with {names[0]}")


def in_range(minimum: float, maximum: float = MAX_COUNT) -> Callable[[T | None], T | None]:
    """Return an option's callback that accepts numbers in a range, and None."""

    def check(number: T | None) -> T | None:
        # Written so that NaN is outside of every range.
        if number is not None and not minimum <= number <= maximum:
            raise typer.BadParameter(f"{number} is not between {minimum} and {maximum}")
        return number

    return check


def one_of(*names: str) -> Callable[[str], str]:
    """Return an option's callback that accepts these names and ""."""

    def check(name: str) -> str:
        if name and name not in names:
            raise typer.BadParameter(f"{name[:40]!r} is not one of {', '.join(names)}")
        return name

    return check
