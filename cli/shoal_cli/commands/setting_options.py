"""Options made from declared settings, so that a command names none of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer

from shoal_common.errors import BadInput, NotFound
from shoal_common.settings.declaration import CliFlag, Setting, Value
from shoal_common.settings.values import check_value


class ListChange(msgspec.Struct, frozen=True):
    """Directories that a list gains and loses."""

    setting: Setting
    added: list[str]
    removed: list[str]

    def applied(self, paths: Sequence[str], node: str) -> list[str]:
        """Return a node's list with the change. Raises NotFound for a path that is not there to remove."""
        noun = self.setting.usage.remove_flag.name.removeprefix("--remove-") if self.setting.usage.remove_flag else ""
        for path in self.removed:
            if path not in paths:
                raise NotFound(f"{path} is not a {noun} of {node} (known: {', '.join(paths) or 'none'})")
        changed = [*(path for path in paths if path not in self.removed), *self.added]
        return list(check_value(self.setting, changed, self.setting.key))


class GivenSettings(msgspec.Struct, frozen=True):
    """The settings that were typed."""

    values: dict[str, Value]
    """Checked values, by the setting's key; None where `none` was typed."""
    lists: list[ListChange]
    """Changes of lists, which need the list as it is."""


NONE_GIVEN = GivenSettings({}, [])


def setting_options(
    settings: Iterable[Setting], note: str = "", can_remove: bool = True
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Return a decorator that gives a command the settings' flags. The command gets their values as `given`.

    `note` ends each option's help.
    """
    flagged = [(s, flag, f"{s.name}_{n}") for s in settings for n, flag in enumerate(_flags(s, can_remove))]
    options = [_parameter(setting, flag, name, note) for setting, flag, name in flagged]

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(command)
        def with_given(**arguments: Any) -> int:
            typed = [(setting, flag, arguments.pop(name)) for setting, flag, name in flagged]
            return command(**arguments, given=_given(typed))

        own = inspect.signature(command, eval_str=True)
        parameters = [[p] if name != "given" else options for name, p in own.parameters.items()]
        with_given.__signature__ = own.replace(parameters=[p for group in parameters for p in group])  # type: ignore[attr-defined]  # what inspect reads
        return with_given

    return decorate


def flag_names(settings: Iterable[Setting]) -> str:
    """Return the settings' flags for a sentence: `--a, --b or --c`."""
    *most, last = [flag.name for s in settings for flag in _flags(s, can_remove=True)]
    return f"{', '.join(most)} or {last}"


def _flags(setting: Setting, can_remove: bool) -> list[CliFlag]:
    usage = setting.usage
    return [flag for flag in (usage.flag, usage.remove_flag if can_remove else None) if flag is not None]


def _parameter(setting: Setting, flag: CliFlag, name: str, note: str) -> inspect.Parameter:
    kind: Any = list[str] if setting.is_list else (Literal[setting.choices] if setting.choices else str) | None
    text, metavar = flag.help or setting.description, "PATH"
    if setting.is_list:
        text += "; repeatable"
    elif setting.choices:
        metavar = f"[{'|'.join(setting.choices)}]"
    elif setting.unit:
        metavar = setting.unit.metavar
        text += f", like {setting.usage.example}" + (", or none" if setting.is_nullable else "")
    option = typer.Option(flag.name, metavar=metavar, show_default=False, help=text + note)
    default: list[str] | None = [] if setting.is_list else None
    ordinary = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(name, ordinary, default=default, annotation=Annotated[kind, option])


def _given(typed: Iterable[tuple[Setting, CliFlag, Any]]) -> GivenSettings:
    values: dict[str, Value] = {}
    lists: dict[str, ListChange] = {}
    for setting, flag, value in typed:
        if not setting.is_list:
            values |= {} if value is None else {setting.key: _value(setting, flag, value)}
        elif value:
            change = lists.setdefault(setting.key, ListChange(setting, [], []))
            (change.removed if flag == setting.usage.remove_flag else change.added).extend(value)
    return GivenSettings(values, list(lists.values()))


def _value(setting: Setting, flag: CliFlag, text: str) -> Any:
    if setting.is_nullable and text.strip().lower() == "none":
        return None
    return check_value(setting, text if setting.unit is None else setting.unit.parse(text), flag.name)


def refuse_missing(lists: Iterable[ListChange]) -> None:
    """Raise BadInput for an added path that is no directory of this machine: a typo must not be saved."""
    for change in lists:
        for path in change.added:
            directory = Path(path).expanduser()
            # Storage makes the directory of a volume, in one that is there.
            is_made = change.setting.key == "volumes" and directory.parent.is_dir()
            if not directory.is_dir() and not (is_made and not directory.exists()):
                raise BadInput(
                    f"{path} is no directory of this machine: create it, or mount its disk; nothing was changed"
                )
