"""Typer as `shoal` uses it: plain help with examples kept as written, and hints for misspelt commands."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from shoal_cli.option_values import with_plain_values
from shoal_common.errors import BadInput


class CommandHelp(TyperCommand):
    """A command with its arguments as their metavars say, and an epilog that is printed line by line."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return what follows the command in its usage line."""
        return ["[OPTIONS]", *(p.metavar for p in self.get_params(ctx) if p.param_type_name == "argument")]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options."""
        params = self.get_params(ctx)
        arguments = [(p.metavar, p.help) for p in params if p.param_type_name == "argument"]
        options = [p.get_help_record(ctx) for p in params if p.param_type_name == "option"]
        for heading, rows in (("Arguments", arguments), ("Options", options)):
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return its options and arguments."""
        return with_plain_values(super().get_params(ctx))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the epilog as it is."""
        _write_epilog(self.epilog, formatter)


class GroupHelp(TyperGroup):
    """A group whose help lists its commands in sections, and which hints at the command that was meant."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return its options."""
        return with_plain_values(super().get_params(ctx))

    def command_sections(self, ctx: Any) -> Mapping[str, Sequence[str]]:
        """Return the commands by heading."""
        return {"Actions": self.list_commands(ctx)}

    def meant(self, name: str) -> str:
        """Return the command that is meant by a name from elsewhere, or ""."""
        return ""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write one section per heading."""
        sections = self.command_sections(ctx)
        width = formatter.width - 6 - max(len(name) for names in sections.values() for name in names)
        for heading, names in sections.items():
            with formatter.section(heading):
                formatter.write_dl([(n, self._short_help(ctx, n, width)) for n in names])

    def _short_help(self, ctx: Any, name: str, width: int) -> str:
        command = self.get_command(ctx, name)
        return command.get_short_help_str(width) if command else ""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the epilog as it is."""
        _write_epilog(self.epilog, formatter)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that was typed. Raises BadInput with a hint."""
        names = self.list_commands(ctx)
        if args[0] in names or args[0].startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        meant = self.meant(args[0])
        close = [meant] if meant else difflib.get_close_matches(args[0], names, n=1)
        path = ctx.command_path
        hint = f"did you mean `{path} {close[0]}`?" if close else f"`{path} --help` lists the commands"
        raise BadInput(f"unknown command {args[0][:40]!r}: {hint}")


def _write_epilog(epilog: str | None, formatter: Any) -> None:
    if epilog:
        formatter.write(f"\n{epilog.rstrip()}\n")


def new_app(**settings: Any) -> typer.Typer:
    """Return the Typer app of one verb."""
    return typer.Typer(
        add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, cls=GroupHelp, **settings
    )
