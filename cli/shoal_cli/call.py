"""What every command works with, and how it answers: as JSON for programs, or for people."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from rich.console import Console, RenderableType

from shoal_cli.client.answers import Anything
from shoal_cli.client.gateway import Gateway, find_gateway
from shoal_cli.home import Home
from shoal_common.config import home_directory

T = TypeVar("T")


class Call:
    """What every command works with."""

    def __init__(self, args: argparse.Namespace, environ: Mapping[str, str]) -> None:
        self.args, self.environ = args, environ
        stated = getattr(args, "home", "")
        self.home = Home(Path(stated).expanduser().absolute() if stated else home_directory(environ))
        self.out = Console(highlight=False)
        self.err = Console(stderr=True, highlight=False)

    @property
    def gateway(self) -> Gateway:
        """The gateway this command is for."""
        return find_gateway(getattr(self.args, "gateway", ""), self.home, self.environ)

    def say(self, words: str) -> None:
        """One line for a person, on stdout."""
        self.out.print(words, markup=False, soft_wrap=True)


def print_json(value: object) -> int:
    """For programs, on stdout. Returns the exit code of what went well."""
    print(json.dumps(value, indent=2, ensure_ascii=False))
    return 0


def shown(call: Call, answer: T, table: Callable[[T], RenderableType]) -> int:
    """An answer as it is, for programs, or as a table."""
    if call.args.as_json:
        return print_json(msgspec.to_builtins(answer))
    call.out.print(table(answer))
    return 0


def read_as(answer: Anything, kind: type[Any]) -> Any:
    """An answer, or a part of one, as this kind."""
    return msgspec.convert(answer, kind)
