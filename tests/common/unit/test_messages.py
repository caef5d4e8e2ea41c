"""Messages only grow: old bytes decode for ever, unknown fields are ignored, malformed bytes raise a clear error."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import types
import typing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_common import messages
from shoal_common.errors import BadMessage, ErrorBody
from shoal_common.messages import WireStruct, decode, encode
from shoal_common.messages.manifest import Manifest, ManifestFile
from shoal_common.messages.placement import PlaceCommand
from shoal_common.messages.storage import ModelState
from shoal_common.names import ModelId

GOLDEN: dict[str, dict[str, Any]] = json.loads((Path(__file__).parents[1] / "golden_v1.json").read_text())
"""Every message as version 1 first wrote it, with every field set. Never change one; only add."""


def every_message() -> list[type[WireStruct]]:
    return [
        kind
        for module in pkgutil.iter_modules(messages.__path__, f"{messages.__name__}.")
        for _, kind in inspect.getmembers(importlib.import_module(module.name), inspect.isclass)
        if issubclass(kind, WireStruct) and kind.__module__ == module.name
    ]


LEAVES: dict[Any, st.SearchStrategy[Any]] = {
    str: st.text(max_size=20),
    int: st.integers(-(2**53), 2**53),
    bool: st.booleans(),
    bytes: st.binary(max_size=20),
    ModelId: st.text(max_size=20),
    float: st.floats(allow_nan=False, allow_infinity=False),
    Any: st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5) | st.lists(st.text(max_size=3)),
    msgspec.Raw: st.just(msgspec.Raw(b'{"any":1}')),
    type(None): st.none(),
    msgspec.UnsetType: st.just(msgspec.UNSET),
}


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for a message, or for the type of a message's field."""
    if kind in LEAVES:
        return LEAVES[kind]
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return st.builds(kind, **{f.name: values_of(f.type) for f in msgspec.structs.fields(kind)})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return values_of(arguments[0])
    if origin is list:
        return st.lists(values_of(arguments[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(values_of(arguments[0]), values_of(arguments[1]), max_size=3)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values_of(a) for a in arguments])
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    raise NotImplementedError(f"a message has a field of a new type: {kind}")


@pytest.mark.parametrize("kind", every_message(), ids=lambda k: k.__name__)
def test_every_message_survives_a_round_trip(kind: type[WireStruct]) -> None:
    @given(values_of(kind))
    def comes_back(message: WireStruct) -> None:
        again = decode(encode(message), kind)
        assert again == message or encode(again) == encode(message)  # raw JSON has no equality of its own

    comes_back()


@pytest.mark.parametrize("kind", every_message(), ids=lambda k: k.__name__)
def test_messages_of_version_1_decode_for_ever(kind: type[WireStruct]) -> None:
    old = GOLDEN[kind.__name__]
    message = decode(json.dumps(old).encode(), kind)
    assert json.loads(encode(message)) == old


@pytest.mark.parametrize("kind", every_message(), ids=lambda k: k.__name__)
def test_fields_of_a_newer_version_are_ignored(kind: type[WireStruct]) -> None:
    old = GOLDEN[kind.__name__]
    newer = {**old, "a_field_of_next_year": {"deep": [1, 2]}}
    assert encode(decode(json.dumps(newer).encode(), kind)) == encode(decode(json.dumps(old).encode(), kind))


@pytest.mark.parametrize(
    "data",
    [b"{", b"[]", b"7", b"null", b'"text"', b"\xff\xfe", b'{"model": 7}', b'{"nodes": ["a"]}', b'{"model":"\xff"}'],
)
def test_malformed_data_raises_bad_message_that_names_the_kind(data: bytes) -> None:
    with pytest.raises(BadMessage, match="Place"):
        decode(data, PlaceCommand)


def test_json_nested_beyond_reason_raises_bad_message() -> None:
    with pytest.raises(BadMessage):
        decode(b'{"model":' + b"[" * 100_000, PlaceCommand)
    with pytest.raises(BadMessage):
        decode(b'{"extra":' + b"[" * 100_000 + b"]" * 100_000 + b"}", PlaceCommand)


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_raise_bad_message(data: bytes) -> None:
    try:
        assert isinstance(decode(data, ModelState), ModelState)
    except BadMessage as e:
        assert len(e.message) < 500


def test_an_empty_payload_is_a_message_without_fields() -> None:
    with pytest.raises(BadMessage, match="model"):
        decode(b"", PlaceCommand)
    assert decode(b"", ErrorBodyless) == ErrorBodyless()


class ErrorBodyless(WireStruct):
    """A message without required fields."""

    error: ErrorBody | None = None


def test_files_that_share_content_count_once() -> None:
    same = "a" * 64
    manifest = Manifest(
        repo="org/name",
        commit="0" * 40,
        files=[
            ManifestFile(path="one", size_bytes=5, sha256=same),
            ManifestFile(path="two", size_bytes=5, sha256=same),
            ManifestFile(path="three", size_bytes=7, git_sha1="b" * 40),
        ],
    )
    assert manifest.size_bytes == 12
    assert not manifest.sealed
    assert manifest.blob_sizes == {same: 5, f"git-{'b' * 40}": 7}


def test_whoever_decodes_json_catches_all_that_it_raises() -> None:
    """Not MsgspecError alone: bytes that are no UTF-8, and what is nested deep, raise others (DECODE_ERRORS)."""
    root = Path(__file__).parents[3]
    sources = [p for top in ("libs", "services", "cli") for p in (root / top).rglob("*.py")]
    catching = {p.parent.name for p in sources if "msgspec.MsgspecError" in p.read_text()}
    assert catching == {"messages"} and len(sources) > 200
    assert not [p for p in sources if "msgspec.DecodeError" in p.read_text()]
