"""Converting option values. Typer does it with pydantic, whose import alone would cost each command 150 ms."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

import typer


class PlainValue:
    """Converts what was typed for one option or argument: text, numbers, choices, and lists of these."""

    def __init__(self, annotation: Any) -> None:
        self._kind = get_args(annotation)[0] if get_origin(annotation) is list else annotation

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return the value, or a tuple of values for what is repeatable. Raises BadParameter."""
        repeatable = param.multiple or param.nargs == -1
        if value is None:
            return () if repeatable else None
        try:
            return tuple(map(self._convert, value)) if repeatable else self._convert(value)
        except ValueError as e:
            raise typer.BadParameter(str(e), ctx=ctx, param=param) from None

    def _convert(self, value: Any) -> Any:
        if not isinstance(value, str):
            return value  # a default
        if get_origin(self._kind) is Literal:
            if value not in get_args(self._kind):
                raise ValueError(f"{value[:40]!r} is not one of {', '.join(get_args(self._kind))}")
            return value
        if self._kind not in (int, float):
            return value
        try:
            return self._kind(value)
        except ValueError:
            kind = "whole number" if self._kind is int else "number"
            raise ValueError(f"{value[:40]!r} is not a {kind}") from None


def with_plain_values(params: list[Any]) -> list[Any]:
    """Make a command's parameters convert their values by PlainValue. Returns them."""
    for param in params:
        plain = PlainValue(param.type_descriptor.annotation)
        param.get_runtime_param = lambda plain=plain: plain
    return params
