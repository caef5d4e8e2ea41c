"""What every command works with, and how it answers: as JSON for programs, as text for people."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import typer

from shoal_cli.node_home import Home
from shoal_common.config import home_directory

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from shoal_cli.api.client import GatewayClient

T = TypeVar("T")


class CommandResult(msgspec.Struct, frozen=True):
    """What a command ends with: the API's answer for `--json`, lines for a person, and the exit code."""

    answer: dict[str, Any]
    lines: list[str]
    table: Any = None
    """A Rich renderable, printed before the lines."""
    exit_code: int = 0


class CliContext:
    """What every command works with. An option may stand before the verb, after it, or after its action."""

    def __init__(self, ctx: typer.Context, as_json: bool = False) -> None:
        self.environ = dict(os.environ)
        self.as_json = as_json or bool(option(ctx, "as_json"))
        home = option(ctx, "home")
        self.home = Home(Path(home).expanduser().absolute() if home else home_directory(self.environ))
        self._gateway = option(ctx, "gateway") or ""

    @cached_property
    def out(self) -> Console:
        """Stdout. Rich is imported only when something is drawn."""
        from shoal_cli.render.console import new_console  # noqa: PLC0415

        return new_console(self.environ)

    @cached_property
    def err(self) -> Console:
        """Stderr."""
        from shoal_cli.render.console import new_console  # noqa: PLC0415

        return new_console(self.environ, stderr=True)

    @property
    def gateway(self) -> GatewayClient:
        """The gateway that this command asks."""
        from shoal_cli.api.client import resolve_gateway  # noqa: PLC0415

        return resolve_gateway(self._gateway, self.home, self.environ)

    @property
    def has_own_gateway(self) -> bool:
        """Whether the gateway that this command asks is that of this home's node."""
        return not (self._gateway or self.environ.get("SHOAL_GATEWAY"))

    def print(self, text: str) -> None:
        """Print one line for a person on stdout."""
        print(text)

    def print_json(self, value: object) -> int:
        """Print a document for programs on stdout. Returns exit code 0."""
        print(json.dumps(value, indent=2, ensure_ascii=False))
        return 0

    def render(self, answer: T, table: Callable[[T], RenderableType]) -> int:
        """Print an answer as it is, for programs, or as a table. Returns exit code 0."""
        if self.as_json:
            return self.print_json(msgspec.to_builtins(answer))
        self.draw(table(answer))
        return 0

    def draw(self, renderable: RenderableType) -> None:
        """Draw on stdout. A line may be wider than the terminal, which then breaks it: an id stays whole."""
        self.out.print(renderable, crop=False)

    def finish(self, result: CommandResult) -> int:
        """Print a command's result. Returns its exit code."""
        if self.as_json:
            self.print_json(result.answer)
            return result.exit_code
        if result.table is not None:
            self.draw(result.table)
        for line in result.lines:
            self.print(line)
        return result.exit_code


def option(ctx: typer.Context, name: str) -> Any:
    """Return an option as typed nearest to the end of the command line, or None."""
    at: Any = ctx
    while at is not None:
        if at.params.get(name):
            return at.params[name]
        at = at.parent
    return None
