"""Message fields made from declared settings: those of the command that changes them and of the published state."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, inspect

from shoal_common.settings.declaration import Section, Setting, settings_of
from shoal_common.settings.values import changeable


def with_changes_of(kind: type[Section], base: type[msgspec.Struct]) -> Any:
    """Return a message that has a field for each changeable setting, by key; left out it stays as it is.

    A field takes any value: `checked_changes` refuses a wrong one in the words that all sources share.
    """
    return _extended(base, {s.key: (_annotated(Any, s), msgspec.UNSET) for s in changeable(kind)})


def with_values_of(kind: type[Section], base: type[msgspec.Struct]) -> Any:
    """Return a message that has the settings as fields, by name and without ranges.

    A field that is not sent is empty or 0, whatever the setting's default, which may change: old bytes keep their
    meaning.
    """
    return _extended(base, {s.name: _value_field(s) for s in settings_of(kind)})


def _value_field(setting: Setting) -> tuple[Any, Any]:
    if setting.choices:
        return _annotated(Literal[setting.choices], setting), setting.choices[0]
    if isinstance(setting.kind, inspect.StrType):
        return _annotated(str, setting), ""
    number: Any = int if isinstance(setting.kind, inspect.IntType) else float
    if setting.is_nullable:
        return _annotated(number | None, setting), None
    return _annotated(number, setting), number(0)


def _annotated(kind: Any, setting: Setting) -> Any:
    return Annotated[kind, Meta(description=setting.description, extra={"setting": setting})]


def _extended(base: type[msgspec.Struct], fields: dict[str, tuple[Any, Any]]) -> Any:
    namespace: dict[str, Any] = {name: default for name, (_, default) in fields.items()}
    namespace |= {"__annotations__": {name: kind for name, (kind, _) in fields.items()}, "__module__": __name__}
    metaclass: Any = type(base)
    return metaclass(f"{base.__name__}WithSettings", (base,), namespace)
