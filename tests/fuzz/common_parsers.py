"""Parsers of shoal_common: names, messages, bitmaps, headers of weights, HTTP, keys, files of a home, /proc."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import pkgutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from uvicorn.server import ServerState

from shoal_common import messages, units
from shoal_common.bus.keys import download_key
from shoal_common.config import read_settings_file
from shoal_common.errors import BadInput, Corrupt, ShoalError
from shoal_common.host import cgroup, interfaces
from shoal_common.host.process_identity import boot_id
from shoal_common.http.bounded_protocol import BoundedHttpProtocol
from shoal_common.http.host_rule import host_error
from shoal_common.hub_token import GivenToken
from shoal_common.identity import certificates
from shoal_common.identity.nkey import Nkey, check_public_nkey, is_signed_by
from shoal_common.liveness.compatibility import are_compatible, compatibility_version
from shoal_common.messages import DECODE_ERRORS, WireStruct, decode, encode
from shoal_common.models.layer_tensors import check_layers, covers, union
from shoal_common.models.model_shape import parse_model_shape
from shoal_common.models.safetensors_header import PREFIX_BYTES, header_end, parse_tensors
from shoal_common.names import (
    ModelRef,
    check_blob,
    check_commit,
    check_file_path,
    check_holder,
    check_id,
    check_model_id,
    check_node,
    quote_key,
)
from shoal_common.settings.declaration import Section
from shoal_common.settings.node import StorageSettings, TransferSettings
from shoal_common.settings.values import read_valid_settings
from shoal_common.store import leaf_set
from shoal_common.store.relay_bitmap import parse_relay_bitmap
from tests.common.http_application import configured
from tests.common.unit.test_bounded_protocol import Transport
from tests.fuzz.parser_under_test import JSON_PIECES, Parser, json_or_none, text_of

KINDS = sorted(
    {
        kind
        for module in pkgutil.iter_modules(messages.__path__, f"{messages.__name__}.")
        for _, kind in inspect.getmembers(importlib.import_module(module.name), inspect.isclass)
        if issubclass(kind, WireStruct)
    },
    key=lambda kind: kind.__name__,
)
_AUTHORITY = certificates.create_authority("fuzz")
_SEED = Nkey.create()
_MAX_PATH_BYTES = 4096
"""The kernel's own bound."""


def _names(data: bytes) -> None:
    text = text_of(data)
    assert not set(quote_key(text)) & set(" .*>")
    checks: tuple[Callable[[str], str], ...] = (
        check_blob, check_commit, check_file_path, check_holder, check_id, check_model_id, check_node,
    )  # fmt: skip
    for check in checks:
        try:
            assert check(text) == text
        except ShoalError as e:
            assert "\n" not in e.message
    ref = ModelRef.parse(text)
    assert ModelRef.parse(str(ref)) == ref
    assert " " not in download_key("a", text)


def _message(data: bytes) -> None:
    kind = KINDS[data[0] % len(KINDS)] if data else WireStruct
    message = decode(data[1:], kind)
    assert decode(encode(message), kind) == message


def _relay_bitmap(data: bytes) -> None:
    bitmap = parse_relay_bitmap(boot_id() + data)
    parse_relay_bitmap(data)
    if bitmap is None:
        return
    assert 0 <= bitmap.have_bytes <= bitmap.size_bytes
    assert all(0 <= a < b <= bitmap.size_bytes for a, b in bitmap.missing_ranges())


def _leaf_ranges(data: bytes) -> None:
    ranges = msgspec.json.decode(data, type=list[list[int]])
    size_bytes = 50 << 30
    leaves = leaf_set.from_ranges(ranges, size_bytes)
    assert leaf_set.from_ranges(leaf_set.to_ranges(leaves), size_bytes) == leaves
    assert 0 <= leaf_set.byte_count(leaves, size_bytes) <= size_bytes


def _layers(data: bytes) -> None:
    runs = msgspec.json.decode(data, type=list[list[int]])
    held = [list(check_layers(run)) for run in runs]
    joined = union(held)
    assert all(covers(joined, run) for run in held)


def _safetensors(data: bytes) -> None:
    end = header_end(data[:PREFIX_BYTES], "f")
    tensors = parse_tensors(data[:end], "f")
    assert all(0 <= t.start <= t.end for t in tensors.values())


def _model_shape(data: bytes) -> None:
    config, newline, header = data.partition(b"\n")
    given = json_or_none(config)
    if isinstance(given, dict) and newline:
        shape = parse_model_shape(given, parse_tensors(bytes(PREFIX_BYTES) + header, "f"))
        assert shape == decode(encode(shape), type(shape))


def _head(data: bytes) -> None:
    async def receive() -> None:
        config, rules = _http()
        protocol = BoundedHttpProtocol(config, ServerState(), {})
        protocol.rules = rules
        protocol.connection_made(Transport())
        for at in range(0, len(data), 1000):
            protocol.data_received(data[at : at + 1000])
            await asyncio.sleep(0)
        protocol.connection_lost(None)
        await asyncio.sleep(0)
        assert rules.bodies_bytes == 0

    asyncio.run(receive())


def _http() -> Any:
    released = asyncio.Event()
    released.set()
    return configured(released)


def _host(data: bytes) -> None:
    target, _, host = data.partition(b" ")
    for loopback_only in (True, False):
        error = host_error(target, [(b"host", host)], loopback_only)
        assert error is None or "\n" not in error.message


def _key(data: bytes) -> None:
    text = text_of(data)
    try:
        Nkey.from_text(text)
    except ShoalError as e:
        assert len(text) < 10 or text not in e.message, "it may be a secret"
    with suppress(ShoalError):
        check_public_nkey(text)
    assert not is_signed_by(_SEED.public, text, data)


def _certificate(data: bytes) -> None:
    authority, authority_pem = _AUTHORITY
    text = text_of(data)
    calls: tuple[Callable[[], object], ...] = (
        lambda: certificates.key_from_pem(data),
        lambda: certificates.fingerprint(data),
        lambda: certificates.public_key_of(text, authority_pem, "a"),
        lambda: certificates.issue(authority, authority_pem, text, "a", []),
    )
    for call in calls:
        with suppress(ShoalError):
            call()


def _settings(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as home:
        Path(home, "node.toml").write_bytes(data)
        file = read_settings_file(Path(home))
    kinds: tuple[type[Section], ...] = (StorageSettings, TransferSettings)
    for kind in kinds:
        _, errors = read_valid_settings(kind, file, {})
        assert all("\n" not in e.message for e in errors)


def _proc(data: bytes) -> None:
    first, _, second = text_of(data[:_MAX_PATH_BYTES]).partition("\x00")
    for group in cgroup.groups_of(first, second):
        cgroup.memory_limit_of(group, {"memory.stat": first, "memory.max": second, "memory.current": second})
    interfaces.hardware_ports(first)


def _units(data: bytes) -> None:
    text = text_of(data)
    for parse in (units.parse_bytes, units.parse_rate, units.parse_duration_s):
        try:
            assert parse(text) >= 0
        except ShoalError as e:
            assert "\n" not in e.message
    compatibility_version(text)
    are_compatible(text, "1.2.3")


def _token(data: bytes) -> None:
    given = msgspec.json.decode(data, type=GivenToken).check()
    assert given.token.isprintable() and (given.token in given.model or given.token not in repr(given))


PARSERS = (
    Parser(
        "names", _names, (b"org/name", b"@", b"..", b"/", b"--", b"a" * 40, "\ud800".encode(errors="surrogatepass"))
    ),
    Parser("message", _message, JSON_PIECES),
    Parser("relay_bitmap", _relay_bitmap, (b"\xff" * 8, bytes(8))),
    Parser("leaf_ranges", _leaf_ranges, (b"[[", b"]]", b",", *JSON_PIECES), (BadInput, *DECODE_ERRORS)),
    Parser("layers", _layers, (b"[[", b"]]", b",", *JSON_PIECES), (BadInput, *DECODE_ERRORS)),
    Parser("safetensors", _safetensors, (b'"data_offsets":[', b'"shape":[', *JSON_PIECES), (Corrupt,)),
    Parser(
        "model_shape",
        _model_shape,
        (b'"model_type":"', b'"text_config":', b'"quantization":', b"model.layers.0.", b"\n", *JSON_PIECES),
    ),
    Parser(
        "http_head",
        _head,
        (b"\r\n", b"GET / HTTP/1.1\r\n", b"Content-Length: ", b"Transfer-Encoding: chunked\r\n", b"Host: ", b"\0"),
        (),
    ),
    Parser("host", _host, (b"/ ", b"127.0.0.1", b"[::1]", b":80", b"localhost"), ()),
    Parser("nkey", _key, (b"SU", b"UA", b"="), ()),
    Parser("certificate", _certificate, (b"-----BEGIN CERTIFICATE-----\n", b"-----END CERTIFICATE-----\n"), ()),
    Parser("node_toml", _settings, (b"[storage]\n", b"= ", b'"', b"[" * 2000, b"\n", b"a.b.c"), (BadInput,)),
    Parser("proc", _proc, (b"0::/", b" - cgroup2 ", b"\\040", b"\n", b"\0", b"max"), ()),
    Parser("units", _units, (b"GB", b"MiB/s", b"1e9", b"h", b"-", b"nan", b"inf", b"9" * 400), ()),
    Parser("hub_token", _token, JSON_PIECES, (ShoalError, *DECODE_ERRORS)),
)
