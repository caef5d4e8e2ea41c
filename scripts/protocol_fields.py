"""Render the fields of every message into docs/protocol.md, between `<!-- fields:… -->` and `<!-- /fields -->`.

Structs are found in `shoal_common.messages`, and what a field means in the docstring below it. Subjects and replies
come from the tables of handlers in the services' sources. `--check` fails if the page is stale.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import types
import typing
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from scripts.generated_page import update
from shoal_common import messages
from shoal_common.messages import WireStruct
from shoal_common.messages.envelope import Command
from shoal_common.names import ModelId
from shoal_common.settings.declaration import Setting

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "protocol.md"
SERVICES = ("storage", "fetcher", "placement", "inference")
SHARED = "shared"  # structs of no single service: envelopes, liveness

Struct = type[msgspec.Struct]
_SUBJECT = re.compile(r"`((?:cmd|svc)\.[^`]+)`: ")
_PUBLISHER = re.compile(r"(?:key `[^`]+`|Subject `[^`]+` \([^)]*\)), published by ([^.]+)")
_SCALARS: dict[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean", bytes: "base64"}
_SCALARS |= {ModelId: "string", Any: "any JSON", msgspec.Raw: "any JSON"}


class Endpoint(NamedTuple):
    """An entry of a service's table of handlers: its subject, and the names of its structs; `reply` may be ""."""

    service: str
    subject: str
    request: str
    reply: str


def all_messages() -> dict[str, Struct]:
    """Return every message struct by name, in the order of the source."""
    modules = [
        importlib.import_module(f"{messages.__name__}.{m.name}") for m in pkgutil.iter_modules(messages.__path__)
    ]
    kinds = [kind for m in modules for kind in vars(m).values() if _is_struct(kind) and kind.__module__ == m.__name__]
    return {kind.__name__: kind for kind in kinds if issubclass(kind, WireStruct)}


def endpoints(structs: dict[str, Struct]) -> Iterator[Endpoint]:
    """Yield the entries `"verb": Handler(Struct, function[, deadline_s])`; a command's handler has a deadline."""
    for service in SERVICES:
        trees = [
            ast.parse(path.read_text()) for path in sorted((ROOT / "services" / service).glob("shoal_*/**/*.py"))
        ]
        for tree in trees:
            keywords = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.keyword)}
            address = "any" if "address='any'" in keywords else "<node>"
            for table in (node for node in ast.walk(tree) if isinstance(node, ast.Dict)):
                for key, call in zip(table.keys, table.values, strict=True):
                    if isinstance(call, ast.Call) and len(call.args) > 1 and _last_name(call.args[0]) in structs:
                        request, handler = map(_last_name, call.args[:2])
                        kind = f"cmd.{service}.{address}" if len(call.args) == 3 else f"svc.{service}.<node>"
                        reply = _reply(trees, handler.strip(")"), request)
                        verb = ast.literal_eval(key) if key else ""
                        yield Endpoint(service, f"{kind}.{verb}", request, reply if reply in structs else "")


def _reply(trees: list[ast.Module], handler: str, request: str) -> str:
    for function in (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef)):
        if function.name == handler and request in [_last_name(a.annotation) for a in function.args.args]:
            return _last_name(function.returns)
    return ""


def _last_name(node: ast.expr | None) -> str:
    return ast.unparse(node).rpartition(".")[2] if node else ""


def field_docs(kind: Struct) -> dict[str, str]:
    """Return the first paragraph of the docstring below each field, from the source: msgspec keeps none."""
    body = ast.parse(inspect.getsource(kind)).body[0].body  # type: ignore[attr-defined]  # a class
    return {
        ast.unparse(field.target): _one_line(str(below.value.value).split("\n\n")[0])
        for field, below in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
    }


def type_text(kind: Any) -> str:
    """Return a type in words; a struct's name links to its table."""
    if kind in _SCALARS:
        return _SCALARS[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if _is_struct(kind):
        return _link(kind.__name__)
    if origin is typing.Annotated:
        return type_text(arguments[0])
    if origin in (list, tuple):
        return f"list of {type_text(arguments[0])}"
    if origin is dict:
        return f"map of {type_text(arguments[0])} to {type_text(arguments[1])}"
    if origin is typing.Literal:
        return ", ".join(f"`{a}`" if a else '`""`' for a in arguments)
    if origin in (typing.Union, types.UnionType):
        members = [type_text(a) for a in arguments if a not in (types.NoneType, msgspec.UnsetType)]
        return " or ".join([*members, "null"] if types.NoneType in arguments else members)
    raise TypeError(f"no words for the type {kind}: add them to {Path(__file__).name}")


def setting_of(field: msgspec.structs.FieldInfo) -> Setting | None:
    """Return the setting that a field was made from, if it was."""
    extras = [meta.extra or {} for meta in getattr(field.type, "__metadata__", ())]
    return next((extra["setting"] for extra in extras if "setting" in extra), None)


def _shown_type(field: msgspec.structs.FieldInfo) -> Any:
    """Return a field's type. Commands take any value for a setting, and check it later: show what they accept."""
    setting = setting_of(field)
    return setting.type if setting and typing.get_args(field.type)[0] is Any else field.type


def _is_struct(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, msgspec.Struct)


def _link(name: str) -> str:
    return f"[{name}](#{name.lower()})"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    return "unchanged" if default is msgspec.UNSET else f"`{msgspec.json.encode(default).decode()}`"


def render(kind: Struct, subjects: list[Endpoint]) -> str:
    """Return a struct's heading, text and table. Raises ValueError for a missing docstring or a wrong subject."""
    text = _one_line(kind.__doc__ or "")
    stated = _SUBJECT.match(text)
    if (stated[1] if stated else "") not in ({e.subject for e in subjects} or {""}):
        raise ValueError(f"{kind.__name__}: its docstring has to begin with the subject `{subjects[0].subject}`: …")
    text = text[stated.end() :] if stated else text
    replies = [f", replies with {_link(e.reply)}" if e.reply else "" for e in subjects]
    requests = [f"\n`shoal.v1.{e.subject}`{reply}" for e, reply in zip(subjects, replies, strict=True)]
    lines = [f"#### {kind.__name__}", *requests, f"\n{text[0].upper()}{text[1:]}"]
    inherited = Command.__struct_fields__ if kind is not Command and issubclass(kind, Command) else ()
    fields = [field for field in msgspec.structs.fields(kind) if field.name not in inherited]
    docs = field_docs(kind)
    for field in fields:
        if setting := setting_of(field):
            null = f"; null: {setting.usage.unset}" if setting.is_nullable else ""
            docs[field.name] = f"{setting.description[0].upper()}{setting.description[1:]}{null}."
    if missing := [field.name for field in fields if field.name not in docs]:
        raise ValueError(f"{kind.__name__}.{missing[0]} has no docstring")
    if fields:
        lines += ["\n| field | type | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [f"| `{f.name}` | {type_text(_shown_type(f))} | {_default(f)} | {docs[f.name]} |" for f in fields]
    return "\n".join(lines)


def used_structs(kind: Any) -> Iterator[Struct]:
    """Yield a struct and those that its fields hold, at any depth."""
    if _is_struct(kind):
        yield kind
    for part in [f.type for f in msgspec.structs.fields(kind)] if _is_struct(kind) else typing.get_args(kind):
        yield from used_structs(part)


def sections() -> dict[str, str]:
    """Return the text of each section; a struct is in the first section that uses it."""
    structs = all_messages()
    table = list(endpoints(structs))
    structs_by_section: dict[str, list[Struct]] = {SHARED: [Command], **{service: [] for service in SERVICES}}
    for kind in structs.values():
        if published := _PUBLISHER.search(_one_line(kind.__doc__ or "")):
            structs_by_section[next((s for s in SERVICES if re.search(rf"\b{s}\b", published[1])), SHARED)].append(
                kind
            )
    for e in table:
        structs_by_section[e.service] += [structs[name] for name in (e.request, e.reply) if name]
    home: dict[Struct, str] = {}
    for service, kinds in (
        *structs_by_section.items(),
        (SHARED, structs.values()),
    ):  # last: the envelope, which no table names
        for kind in (used for root in kinds for used in used_structs(root)):
            home.setdefault(kind, service)
    texts: dict[str, list[str]] = {section: [] for section in structs_by_section}
    for kind, section in home.items():
        texts[section].append(render(kind, [e for e in table if e.request == kind.__name__]))
    return {section: "\n\n".join(parts) for section, parts in texts.items()}


def main() -> None:
    """Rewrite the page, or with `--check` only compare it."""
    update(PAGE, "fields", sections(), "the messages")


if __name__ == "__main__":
    main()
