"""What declares a setting: a field of a `Section`, annotated with its unit and with `setting(…)`. Pure."""

from __future__ import annotations

import typing
from collections.abc import Callable
from functools import cache
from inspect import get_annotations
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta, inspect

from shoal_common.units import format_bytes, format_duration, format_rate, parse_bytes, parse_duration_s, parse_rate

Value = int | float | str | list[str] | None
"""A setting's value in a command or in node.toml; None: none of its own, so the default."""

_MAX_NUMBER = (1 << 63) - 1


class Unit(msgspec.Struct, frozen=True):
    """A unit of numbers: its name, and how people write and read a number of it."""

    name: str
    metavar: str
    parse: Callable[[str], int]
    format: Callable[[float], str]


_BYTES = {"unit": Unit("bytes", "SIZE", parse_bytes, format_bytes)}
_BYTES_PER_S = {"unit": Unit("bytes per second", "RATE", parse_rate, format_rate)}
_SECONDS = {"unit": Unit("seconds", "SPAN", parse_duration_s, format_duration)}

Bytes = Annotated[int, Meta(ge=0, le=_MAX_NUMBER, extra=_BYTES)]
BytesPerSecond = Annotated[int, Meta(ge=1, le=_MAX_NUMBER, extra=_BYTES_PER_S)]
Bandwidth = Annotated[float, Meta(gt=0, le=float(_MAX_NUMBER), extra=_BYTES_PER_S)]
Seconds = Annotated[int, Meta(ge=0, le=_MAX_NUMBER, extra=_SECONDS)]
Timeout = Annotated[float, Meta(gt=0, le=86400, extra=_SECONDS)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Duration = Annotated[float, Meta(ge=1, extra={**_SECONDS, "is_text": True})]
"""Held in seconds, written as text: `36h`."""


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the settings of a section of node.toml. A field is in the section of the class that declares it."""

    section: ClassVar[str]


class CliFlag(msgspec.Struct, frozen=True):
    """An option of the command line; `help` is "" where the setting's own description serves."""

    name: str
    help: str = ""


class Usage(msgspec.Struct, frozen=True):
    """What a declaration says beyond type, default and description; see `setting`."""

    example: str
    unset: str
    flag: CliFlag | None
    remove_flag: CliFlag | None
    has_variable: bool
    is_changeable: bool
    is_local: bool


def setting(
    description: str,
    *,
    example: str = "",
    unset: str = "",
    flag: CliFlag | None = None,
    remove_flag: CliFlag | None = None,
    has_variable: bool = True,
    is_changeable: bool = False,
    is_local: bool = False,
) -> Meta:
    """Return the annotation that makes a field of a `Section` a setting.

    `example` is a value as people write it, and `unset` says what holds where there is none. `flag` sets it on the
    command line; of a list it adds a directory, and `remove_flag` removes one. A variable of the environment
    overrides node.toml. What is changeable is changed while the node runs: by the command `configure` or, if it is
    local, in node.toml alone, followed by `reload`: what names files of the machine is its owner's. The rest is read
    at start.
    """
    usage = Usage(example, unset, flag, remove_flag, has_variable, is_changeable, is_local)
    return Meta(description=description, extra={"usage": usage})


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """A declared setting."""

    name: str
    """Name of the struct's field, and of the published state's."""
    key: str
    """Its name in node.toml, in commands and in their results."""
    section: str
    type: Any
    """The annotated type that values are converted to."""
    kind: inspect.Type
    """What msgspec sees in it, without annotations and None."""
    is_nullable: bool
    """Whether it may have no value, which commands write as null."""
    choices: tuple[str, ...]
    """The values it has one of; empty for numbers, lists and paths."""
    default: Any
    description: str
    usage: Usage
    unit: Unit | None
    is_text: bool
    """Whether a number is written as text with its unit."""
    text: str
    """What a text has to be, in words; "" for any."""
    items: str
    """What a list that is not one of directories has, in words; "" for directories."""

    @property
    def variable(self) -> str:
        """The environment variable that overrides node.toml; "" if there is none."""
        return f"SHOAL_{self.key.upper()}" if self.usage.has_variable else ""

    @property
    def is_list(self) -> bool:
        """Whether it is a list: of directories, or of `items`."""
        return isinstance(self.kind, inspect.VarTupleType)

    @property
    def example(self) -> str:
        """A value as node.toml has it; "" without an example."""
        text = self.usage.example
        if self.is_list:
            return f'["{text}"]'
        if self.unit and text:
            return f'"{text}"' if self.is_text else str(self.unit.parse(text))
        return text

    @property
    def expected(self) -> str:
        """What a value has to be, in words."""
        if self.choices:
            return " or ".join(f'"{choice}"' for choice in self.choices)
        if isinstance(self.kind, inspect.VarTupleType):
            items = self.items or "directories, each absolute or with ~"
            return f"a list of at most {self.kind.max_length} {items}"
        if isinstance(self.kind, inspect.BoolType):
            return "true or false"
        if isinstance(self.kind, inspect.IntType | inspect.FloatType):
            number = "a whole number" if isinstance(self.kind, inspect.IntType) else "a number"
            unit = f" of {self.unit.name}" if self.unit else ""
            if self.is_text:
                return f"a text with its unit (s, min, h, d), at least {self.kind.ge:g} s"
            lowest = f"above {self.kind.gt}" if self.kind.ge is None else f"from {self.kind.ge}"
            highest = self.kind.le if self.kind.le is not None and self.kind.le < _MAX_NUMBER else None
            return f"{number}{unit} {lowest}" + (f" to {highest}" if highest is not None else "")
        return self.text or "a text in quotes"


@cache
def settings_of(kind: type[Section]) -> tuple[Setting, ...]:
    """Return the settings that a section, and those that it extends, declare."""
    sections = {
        name: base.__dict__["section"]
        for base in reversed(kind.__mro__)
        if "section" in base.__dict__
        for name in get_annotations(base)
    }
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    types = {field.name: field.type for field in msgspec.structs.fields(kind)}
    return tuple(
        declared
        for field in info.fields
        if (declared := _declared(field, types[field.name], sections.get(field.name, ""))) is not None
    )


def _declared(field: inspect.Field, annotated: Any, section: str) -> Setting | None:
    kind, is_nullable = field.type, False
    found: dict[str, Any] = {}
    while isinstance(kind, inspect.Metadata | inspect.UnionType):
        if isinstance(kind, inspect.Metadata):
            found |= {**(kind.extra_json_schema or {}), **(kind.extra or {})}
            kind = kind.type
        else:
            is_nullable = True
            [kind] = [k for k in kind.types if not isinstance(k, inspect.NoneType)]
    if "usage" not in found:
        return None
    return Setting(
        name=field.name,
        key=field.encode_name,
        section=section,
        type=annotated,
        kind=kind,
        is_nullable=is_nullable,
        # From the annotation itself, which keeps their order.
        choices=typing.get_args(typing.get_args(annotated)[0]) if isinstance(kind, inspect.LiteralType) else (),
        default=field.default,
        description=found["description"],
        usage=found["usage"],
        unit=found.get("unit"),
        is_text=found.get("is_text", False),
        text=found.get("expected", ""),
        items=found.get("items", ""),
    )
