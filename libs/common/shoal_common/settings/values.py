"""Values of settings: read from node.toml and the environment, or given by a command. Pure.

Everybody who takes a value checks it here, so that all accept the same and refuse it in the same words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from reprlib import Repr
from typing import Any, TypeVar

import msgspec

from shoal_common.errors import BadInput, Refused
from shoal_common.settings.declaration import Section, Setting, Value, settings_of

S = TypeVar("S", bound=Section)

_PATH_SEPARATOR = ":"
"""`os.pathsep`."""
_REPR = Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxlong = 2, 60, 60


def read_settings(kind: type[S], file: Mapping[str, object], environ: Mapping[str, str]) -> S:
    """Return the settings from the parsed node.toml and the environment, which wins.

    Raises BadInput naming the source of a wrong value.
    """
    settings, errors = read_valid_settings(kind, file, environ)
    if errors:
        raise errors[0]
    return settings


def read_valid_settings(
    kind: type[S], file: Mapping[str, object], environ: Mapping[str, str]
) -> tuple[S, list[BadInput]]:
    """Return the settings with the default in place of each invalid one, and what is wrong with those."""
    values: dict[str, Any] = {}
    errors = _unknown_keys(kind, file)
    for setting in settings_of(kind):
        try:
            if text := environ.get(setting.variable):
                values[setting.name] = check_value(setting, _from_text(setting, text), setting.variable)
            elif (value := _section(file, setting.section).get(setting.key)) is not None:
                source = f"{setting.section}.{setting.key} in node.toml"
                values[setting.name] = check_value(setting, value, source)
        except BadInput as e:
            errors += [e] if e.message not in [known.message for known in errors] else []
    return kind(**values), errors


def _unknown_keys(kind: type[Section], file: Mapping[str, object]) -> list[BadInput]:
    section, known = file.get(kind.section), kind.__struct_encode_fields__
    if not kind.__struct_config__.forbid_unknown_fields or not isinstance(section, Mapping):
        return []
    unknown = [str(key) for key in section if key not in known]
    return [
        BadInput(f"{kind.section}.{key} in node.toml is no setting (known: {', '.join(known)})") for key in unknown
    ]


def _section(file: Mapping[str, object], name: str) -> Mapping[str, object]:
    section = file.get(name, {})
    if not isinstance(section, Mapping):
        raise BadInput(f"{name} in node.toml is {_REPR.repr(section)}: expected a section [{name}]")
    return section


def _from_text(setting: Setting, text: str) -> object:
    if not setting.is_list:
        return text
    parts = text.split("," if setting.items else _PATH_SEPARATOR)
    return [part.strip() if setting.items else part for part in parts if part.strip()]


def check_value(setting: Setting, value: object, source: str) -> Any:
    """Return a value as the setting's struct holds it. A number may be text. Raises BadInput naming the source."""
    try:
        plain = setting.unit.parse(value) if setting.is_text and setting.unit and isinstance(value, str) else value
        if setting.is_text and not isinstance(value, str):
            raise BadInput("a number without a unit")
        checked = msgspec.convert(plain, setting.type, strict=False)
        if not setting.is_list:
            return checked
        if bad := [p for p in checked if not (setting.items or p.startswith(("/", "~"))) or not p.isprintable()]:
            value = bad[0]
            raise BadInput("not the path of a directory")
        return tuple(dict.fromkeys(checked))
    except (msgspec.ValidationError, BadInput):
        example = f", for example {setting.example}" if setting.example else ""
        unset = f" (unset: {setting.usage.unset})" if setting.is_nullable else ""
        expected = f"{setting.expected}{example}{unset}"
        raise BadInput(f"{source} is {_REPR.repr(value)}: expected {expected}", param=setting.key) from None


def overridden_by_env(settings: Iterable[Setting], environ: Mapping[str, str]) -> list[str]:
    """Return the keys of the settings that environment variables override."""
    return [s.key for s in settings if environ.get(s.variable)]


def changeable(kind: type[Section]) -> tuple[Setting, ...]:
    """Return the settings that the command `configure` changes."""
    return tuple(s for s in settings_of(kind) if s.usage.is_changeable)


def checked_changes(kind: type[Section], command: object) -> dict[str, Value]:
    """Return what a command changes, by key; None takes a value back.

    Raises BadInput for a wrong value and for a command that changes nothing, Refused for a setting of the owner.
    """
    settings = changeable(kind)
    given = [(s, value) for s in settings if (value := getattr(command, s.key)) is not msgspec.UNSET]
    if local := [s.key for s, _ in given if s.usage.is_local]:
        raise Refused(
            f"{local[0]} names directories of the node's machine, which only its owner may: use `shoal storage set` "
            "on the node itself, or edit its node.toml and send `reload`; nothing was changed",
            param=local[0],
        )
    if not given:
        names = ", ".join(s.key for s in settings if not s.usage.is_local)
        raise BadInput(f"there is nothing to change: give at least one of {names}")
    return {s.key: _plain(check_value(s, value, s.key)) for s, value in given}


def by_section(kind: type[Section], changes: Mapping[str, Value]) -> dict[str, dict[str, Value]]:
    """Return changes as node.toml takes them: by section, None for an empty list."""
    sections: dict[str, dict[str, Value]] = {}
    for setting in changeable(kind):
        if setting.key in changes:
            value = changes[setting.key]
            sections.setdefault(setting.section, {})[setting.key] = None if value == [] else value
    return sections


def with_changes(settings: Mapping[str, Any], section: str, changes: Mapping[str, Value]) -> dict[str, Any]:
    """Return the parsed node.toml after a change; None removes a key. Raises Refused if the section is no table."""
    existing = settings.get(section, {})
    if not isinstance(existing, Mapping):
        raise Refused(f"{section} in node.toml is {existing!r}: write it as a section [{section}] first")
    unchanged = {k: v for k, v in existing.items() if k not in changes}
    table = unchanged | {k: v for k, v in changes.items() if v is not None}
    if not table and section not in settings:
        return dict(settings)
    return {**settings, section: table}


def values_by_key(settings: Section) -> dict[str, Value]:
    """Return the values of the changeable settings by key, as results and events have them."""
    return {s.key: _plain(getattr(settings, s.name)) for s in changeable(type(settings))}


def _plain(value: Any) -> Value:
    return list(value) if isinstance(value, tuple) else value
