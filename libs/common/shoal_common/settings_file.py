"""Changes keys of node.toml and nothing else: a person's comments, order and unknown keys stay.

The new text is parsed and compared with the wanted settings before it is written. If they differ, as they may for a
file written in an unusual way, the change is refused and the file stays as it is.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tomlkit
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import Array, Comment, InlineTable, Table, Trivia

from shoal_common.config import read_settings_file, settings_path, write_settings
from shoal_common.errors import InternalError, Refused
from shoal_common.host.file_kinds import read_text_file
from shoal_common.host.private_files import directory_locked, make_home
from shoal_common.settings.declaration import Value
from shoal_common.settings.values import with_changes

T = TypeVar("T")


def change_settings(
    home: Path, changes: Mapping[str, Mapping[str, Value]], accept: Callable[[dict[str, Any]], T]
) -> T:
    """Set keys of sections, durably and all or none; None removes a key. Returns what `accept` returns.

    `accept` gets all settings as they will be, and refuses them by raising: nothing is written then. A file that
    holds all of it already is not touched. Raises BadInput for a file that is not TOML, Refused for a section that
    cannot be changed without changing more, Failed if the file cannot be written. Blocks.
    """
    make_home(home)
    path = settings_path(home)
    with directory_locked(home):
        before = read_settings_file(home)
        wanted = before
        for section, keys in changes.items():
            wanted = with_changes(wanted, section, keys)
        accepted = accept(wanted)
        if wanted == before:
            return accepted
        after: str | None = read_text_file(path) if path.exists() else ""
        for section, keys in changes.items():
            after = edit_text(after, section, keys) if after is not None and keys else after
        if after is None or _parsed(after) != wanted:
            lines = "; ".join(
                f"{k} = {v!r} in [{section}]" if v is not None else f"no {k} in [{section}]"
                for section, keys in changes.items()
                for k, v in keys.items()
            )
            raise Refused(
                f"{path} is written in a way that Shoal cannot change: write {lines} there by hand, or bring all of "
                "a section under one heading"
            )
        try:
            write_settings(home, after.encode())
        except OSError as e:
            raise InternalError(f"{path} cannot be written: {e.strerror}; nothing was changed") from None
    return accepted


def edit_text(text: str, section: str, changes: Mapping[str, Value]) -> str | None:
    """Return the file's text after a change; None if the section is spread over the file. Pure."""
    try:
        document = tomlkit.parse(text)
        table = document.get(section)
        if table is None:
            table = tomlkit.table()
            if text and not text.endswith("\n"):
                document.add(tomlkit.nl())
            document[section] = table
            table = document[section]
        if not isinstance(table, Table | InlineTable):
            return None
        for key, value in changes.items():
            if value is None:
                _remove(table, key)
            else:
                _set(table, key, value)
        return tomlkit.dumps(document)
    except TOMLKitError:
        return None


def _set(table: Table | InlineTable, key: str, value: int | float | str | list[str]) -> None:
    plain = [k for k, v in table.value.body if k is not None and not isinstance(v, Table)]
    if isinstance(value, list) and isinstance(array := table.get(key), Array):
        # In place: a person's comments beside remaining elements stay.
        for removed in [e for e in array.unwrap() if e not in value]:
            array.remove(removed)
        for added in [e for e in value if e not in array.unwrap()]:
            array.append(added)
        if array.unwrap() == value:
            return
    if key in table or isinstance(table, InlineTable) or not plain:
        table[key] = value
        return
    # After the last key: comments at a section's end belong to the next section more often than to this one.
    table.value._insert_after(plain[-1], key, tomlkit.item(value))


def _remove(table: Table | InlineTable, key: str) -> None:
    if key not in table:
        return
    index, item = next((i, v) for i, (k, v) in enumerate(table.value.body) if k is not None and k.key == key)
    table.remove(key)
    if item.trivia.comment and isinstance(table, Table):
        # A person's comment beside the key stays, on a line of its own.
        table.value.body[index] = (None, Comment(Trivia(comment=item.trivia.comment)))


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError):
        return None
