"""A setting is declared once: every way to set it accepts the same values, and refuses others in the same words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from scripts.settings_tables import SECTIONS, render
from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands.setting_options import NONE_GIVEN, GivenSettings, setting_options
from shoal_common.errors import BadInput, NotFound, Refused
from shoal_common.messages import decode, encode
from shoal_common.messages.envelope import Command
from shoal_common.messages.storage import Configure, StorageState
from shoal_common.settings.declaration import BytesPerSecond, CliFlag, Setting, setting, settings_of
from shoal_common.settings.fields import with_changes_of, with_values_of
from shoal_common.settings.node import (
    InferenceSettings,
    PortSettings,
    PublishedSettings,
    StorageSettings,
    TransferSettings,
)
from shoal_common.settings.values import (
    by_section,
    changeable,
    checked_changes,
    overridden_by_env,
    read_settings,
    read_valid_settings,
    values_by_key,
    with_changes,
)
from shoal_gateway.rest.storage import ConfigureBody
from shoal_gateway.settings import GatewayTimeouts

EVERY = [s for kind in SECTIONS for s in settings_of(kind)]
HEADROOM_BYTES = StorageSettings().headroom_bytes


# Agreement

SCALARS = (
    st.integers(-5, 5)
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([2**63 - 1, 2**63, 65535, 65536])
    | st.booleans()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6)
    | st.sampled_from(["lru", "manual", "200GB", "7d", "5", "-5", "1e3", "null", "none", "~/m", "/m"])
)
VALUES = SCALARS | st.none() | st.lists(SCALARS | st.sampled_from(["/a", "/b", "~"]), max_size=4)


def outcome(settings: Mapping[str, Any]) -> StorageSettings | None:
    """The settings of a node.toml, or None if it is refused."""
    try:
        return read_settings(StorageSettings, settings, {})
    except BadInput:
        return None


def after(command: object) -> StorageSettings | None:
    """The settings after a command to a node that has none, or None if it is refused."""
    try:
        changes = by_section(StorageSettings, checked_changes(StorageSettings, command))
    except BadInput:
        return None
    settings: dict[str, Any] = {}
    for section, keys in changes.items():
        settings = with_changes(settings, section, keys)
    return outcome(settings)


@given(st.sampled_from([s for s in changeable(StorageSettings) if s.usage.is_local]), VALUES)
def test_I12_no_command_sets_what_names_files_of_the_machine(declared: Setting, value: Any) -> None:
    body = json.dumps({declared.key: value}).encode()
    for kind in (Configure, ConfigureBody):
        with pytest.raises(Refused, match=f"^{declared.key} names directories"):
            checked_changes(StorageSettings, decode(body, kind))


@given(st.sampled_from([s for s in changeable(StorageSettings) if not s.usage.is_local]), VALUES)
def test_file_command_and_rest_agree_on_every_value(declared: Setting, value: Any) -> None:
    body = json.dumps({declared.key: value}).encode()
    by_command = after(decode(body, Configure))
    assert by_command == after(decode(body, ConfigureBody))
    if value is None:
        assert (by_command == StorageSettings()) == declared.is_nullable
    else:
        assert by_command == outcome({declared.section: {declared.key: value}})


@given(st.sampled_from(changeable(StorageSettings)), VALUES)
def test_the_environment_agrees_with_the_file_on_every_value(declared: Setting, value: Any) -> None:
    if declared.is_list != isinstance(value, list) or value is None:
        return  # has no text of its own in a variable
    items = [str(item) for item in value] if isinstance(value, list) else [str(value)]
    text = ":".join(items)
    if not text or (declared.is_list and (any(":" in i or not i for i in items) or items != value)):
        return
    try:
        by_variable = read_settings(StorageSettings, {}, {declared.variable: text})
    except BadInput as e:
        assert e.message.startswith(f"{declared.variable} is ")
        by_variable = None
    assert by_variable == outcome({declared.section: {declared.key: value}})


def typed(*arguments: str) -> GivenSettings | None:
    """What a command line with all flags gives its command, or None if it is refused."""
    given_settings = [NONE_GIVEN]
    app = new_app()

    @app.command(cls=CommandHelp)
    @setting_options(changeable(StorageSettings))
    def command(ctx: typer.Context, given: GivenSettings) -> int:
        given_settings.append(given)
        return 0

    result = CliRunner().invoke(app, list(arguments))
    return given_settings[-1] if result.exit_code == 0 else None


@given(
    st.sampled_from([s for s in changeable(StorageSettings) if s.unit]),
    st.integers(0, 10**9 - 1) | st.sampled_from([0, 1]),
)
def test_a_flag_takes_the_numbers_that_a_command_takes(declared: Setting, number: int) -> None:
    assert declared.usage.flag is not None and declared.unit is not None
    assert typed(declared.usage.flag.name, str(number)) is None or number == 0, "a number alone has no unit"
    by_flag = typed(declared.usage.flag.name, f"{number}{'s' if declared.unit.name == 'seconds' else 'B'}")
    by_command = after(decode(json.dumps({declared.key: number}).encode(), Configure))
    assert (by_flag is None) == (by_command is None)
    if by_flag is not None:
        assert by_flag.values == {declared.key: number}


def test_flags_take_units_choices_none_and_directories() -> None:
    made = typed(
        *("--headroom", "5GB", "--max-storage", "none", "--partial-retention", "7d", "--max-hub-rate", "20MB/s"),
        *("--eviction-policy", "lru", "--add-library", "/a", "--add-library", "~/b", "--remove-library", "/c"),
    )
    assert made is not None and made.values == {
        "headroom_bytes": 5 * 10**9,
        "max_storage_bytes": None,
        "partial_retention_s": 7 * 86400,
        "max_hub_bytes_per_s": 20 * 10**6,
        "eviction_policy": "lru",
    }
    [change] = made.lists
    assert change.applied(["/c", "/d", "~/b"], "node-a") == ["/d", "~/b", "/a"]
    with pytest.raises(NotFound, match="/c is not a library of node-a"):
        change.applied(["/d"], "node-a")
    for arguments in (["--headroom", "none"], ["--max-hub-rate", "0"], ["--eviction-policy", "fifo"]):
        assert typed(*arguments) is None


# Reading


@pytest.mark.parametrize(
    ("settings", "environ", "quota_bytes", "headroom_bytes"),
    [
        ({}, {}, None, HEADROOM_BYTES),
        ({"storage": {"max_storage_bytes": 500, "headroom_bytes": 7}}, {}, 500, 7),
        ({"storage": {"max_storage_bytes": 500}}, {"SHOAL_MAX_STORAGE_BYTES": "900"}, 900, HEADROOM_BYTES),
        ({"storage": {"headroom_bytes": 500}}, {"SHOAL_HEADROOM_BYTES": "0"}, None, 0),
        ({"storage": {"max_storage_bytes": 0, "headroom_bytes": 0}}, {"SHOAL_MAX_STORAGE_BYTES": ""}, 0, 0),
    ],
)
def test_limits_come_from_node_toml_and_the_environment_wins(
    settings: Mapping[str, object], environ: Mapping[str, str], quota_bytes: int | None, headroom_bytes: int
) -> None:
    limits = read_settings(StorageSettings, settings, environ)
    assert (limits.quota_bytes, limits.headroom_bytes) == (quota_bytes, headroom_bytes)


BYTES = "expected a whole number of bytes from 0, for example"


@pytest.mark.parametrize(
    ("settings", "environ", "message"),
    [
        ({}, {"SHOAL_HEADROOM_BYTES": "-5"}, f"SHOAL_HEADROOM_BYTES is '-5': {BYTES} 5000000000"),
        (
            {"storage": {"max_storage_bytes": "1 TB"}},
            {},
            f"storage.max_storage_bytes in node.toml is '1 TB': {BYTES} 200000000000 "
            "(unset: limited by the disk only)",
        ),
        (
            {"storage": {"headroom_bytes": True}},
            {},
            f"storage.headroom_bytes in node.toml is True: {BYTES} 5000000000",
        ),
        (
            {"storage": {"headroom_bytes": 1.5}},
            {},
            f"storage.headroom_bytes in node.toml is 1.5: {BYTES} 5000000000",
        ),
        ({"storage": 3}, {}, "storage in node.toml is 3: expected a section [storage]"),
        (
            {"storage": {"path": 3}},
            {},
            'storage.path in node.toml is 3: expected a text in quotes, for example "/mnt/models"',
        ),
        (
            {"transfer": {"max_hub_bytes_per_s": 0}},
            {},
            "transfer.max_hub_bytes_per_s in node.toml is 0: expected a whole number of bytes per second from 1, "
            "for example 20000000 (unset: no limit)",
        ),
        (
            {"storage": {"eviction_policy": "fifo"}},
            {},
            'storage.eviction_policy in node.toml is \'fifo\': expected "manual" or "lru"',
        ),
        (
            {},
            {"SHOAL_VOLUMES": "/a:b"},
            "SHOAL_VOLUMES is 'b': expected a list of at most 16 directories, each absolute or with ~, "
            'for example ["/mnt/big/shoal"]',
        ),
    ],
)
def test_a_wrong_value_is_refused_with_its_source_and_an_example(
    settings: Mapping[str, object], environ: Mapping[str, str], message: str
) -> None:
    with pytest.raises(BadInput) as refused:
        read_settings(StorageSettings, settings, environ)
    assert refused.value.message == message


@given(st.sampled_from([s for s in EVERY if s.variable]), st.text(max_size=300))
def test_no_text_in_the_environment_does_more_than_be_refused(declared: Setting, text: str) -> None:
    kind = next(kind for kind in SECTIONS if declared in settings_of(kind))
    try:
        assert isinstance(read_settings(kind, {}, {declared.variable: text}), kind)
    except BadInput as e:
        assert e.message.startswith(declared.variable) and "\n" not in e.message and len(e.message) < 400


def test_a_value_nested_beyond_reason_is_refused_in_a_short_line() -> None:
    depth = 400
    with pytest.raises(BadInput) as refused:
        checked_changes(
            StorageSettings, decode(b'{"headroom_bytes":' + b"[" * depth + b"]" * depth + b"}", Configure)
        )
    assert refused.value.message.startswith("headroom_bytes is [") and len(refused.value.message) < 200
    with pytest.raises(BadInput) as refused:
        checked_changes(StorageSettings, Configure(headroom_bytes="x" * 10**6))
    assert len(refused.value.message) < 200


def test_wrong_values_leave_the_others_as_they_are() -> None:
    wrong = {"storage": {"headroom_bytes": 7, "eviction_policy": 5}, "transfer": 3}
    settings, errors = read_valid_settings(StorageSettings, wrong, {"SHOAL_LIBRARIES": "/a"})
    assert settings == StorageSettings(headroom_bytes=7, libraries=("/a",))
    assert [e.message.split(":")[0] for e in errors] == [
        "storage.eviction_policy in node.toml is 5",
        "transfer in node.toml is 3",
    ]


def test_every_example_and_every_default_is_accepted() -> None:
    for kind in SECTIONS:
        for declared in settings_of(kind):
            if declared.default is not None and declared.variable:
                text = ":".join(declared.default) if declared.is_list else f"{declared.default}".removesuffix(".0")
                text += "s" if declared.is_text else ""
                assert getattr(read_settings(kind, {}, {declared.variable: text}), declared.name) == declared.default
            if declared.usage.example and declared.unit:
                value = declared.usage.example if declared.is_text else declared.unit.parse(declared.usage.example)
                read_settings(kind, {declared.section: {declared.key: value}}, {})


def test_memory_settings_are_numbers_above_zero() -> None:
    def read(section: Mapping[str, object], **environ: str) -> InferenceSettings:
        return read_settings(InferenceSettings, {"inference": section}, environ)

    assert read({}) == InferenceSettings()
    assert read({"force_floor_bytes": 5}, SHOAL_FORCE_FLOOR_BYTES="7").force_floor_bytes == 7
    assert read({"memory_bytes_per_s": 400e9}).memory_bytes_per_s == 400e9
    assert read({"memory_bytes_per_s": 1}, SHOAL_MEMORY_BYTES_PER_S="10e9").memory_bytes_per_s == 10e9
    for wrong in ("fast", "-1", "nan", "inf", "0"):
        with pytest.raises(BadInput, match="SHOAL_MEMORY_BYTES_PER_S is"):
            read({}, SHOAL_MEMORY_BYTES_PER_S=wrong)
    with pytest.raises(BadInput, match=r"max_memory_bytes in node\.toml is 'much'"):
        read({"max_memory_bytes": "much"})


def test_an_unknown_key_is_refused_in_the_gateways_section_only() -> None:
    with pytest.raises(BadInput, match=r"gateway.silence in node.toml is no setting \(known: tls, accept_s, "):
        read_settings(GatewayTimeouts, {"gateway": {"silence": 5}}, {})
    assert read_settings(GatewayTimeouts, {"gateway": {"silence_s": 5}}, {}).silence_s == 5
    assert read_settings(StorageSettings, {"storage": {"of_next_year": 5}}, {}) == StorageSettings()


def test_a_port_comes_from_the_environment_or_the_file() -> None:
    assert read_settings(PortSettings, {"gateway_port": 5}, {}) == PortSettings()
    in_file = {"node": {"gateway_port": 5, "stage_port": 9000}}
    assert read_settings(PortSettings, in_file, {"SHOAL_STAGE_PORT": "9100"}) == PortSettings(
        gateway_port=5, stage_port=9100
    )
    assert read_settings(PortSettings, {}, {"SHOAL_GATEWAY_PORT": "0"}).gateway_port == 0
    with pytest.raises(BadInput, match="SHOAL_FILESERVER_PORT is '65536': expected a whole number from 0 to 65535"):
        read_settings(PortSettings, {}, {"SHOAL_FILESERVER_PORT": "65536"})


def test_overridden_are_the_changeable_settings_with_a_variable() -> None:
    environ = {"SHOAL_HEADROOM_BYTES": "0", "SHOAL_EVICTION_POLICY": "", "SHOAL_BALLAST_BYTES": "5"}
    assert overridden_by_env(changeable(StorageSettings), environ) == ["headroom_bytes"]


# Messages


def test_published_values_keep_what_old_bytes_mean() -> None:
    """A field that is absent was 0 when it was sent; today's default of the setting is another one."""
    old = decode(b'{"node":"a"}', StorageState)
    assert (old.headroom_bytes, old.partial_retention_s, old.quota_bytes) == (0, 0, None)
    assert StorageSettings().headroom_bytes > 0
    state = StorageState(node="a", headroom_bytes=HEADROOM_BYTES, quota_bytes=5)
    assert json.loads(encode(state)) == {"node": "a", "headroom_bytes": HEADROOM_BYTES, "quota_bytes": 5}
    # A value outside of today's range is another version's: its state is read all the same.
    assert decode(b'{"node":"a","max_hub_bytes_per_s":0}', StorageState).max_hub_bytes_per_s == 0
    assert set(PublishedSettings.__struct_fields__) <= set(StorageState.__struct_fields__)


def test_a_settings_result_has_every_changeable_value() -> None:
    values = values_by_key(StorageSettings(quota_bytes=5, libraries=("/a",)))
    assert (values["max_storage_bytes"], values["libraries"]) == (5, ["/a"])
    assert list(values) == [s.key for s in changeable(StorageSettings)]
    assert {s.key for s in changeable(TransferSettings)} < set(values) and "ballast_bytes" not in values


# A new setting


class SettingsOfNextYear(PublishedSettings, frozen=True, kw_only=True):
    """One line more, as a contributor would write it."""

    section: ClassVar[str] = "storage"

    max_scrub_bytes_per_s: Annotated[
        BytesPerSecond | None,
        setting(
            "limit for verifying blobs",
            example="20MB",
            unset="no limit",
            flag=CliFlag("--max-scrub-rate"),
            is_changeable=True,
        ),
    ] = None


def test_one_line_declares_a_setting_everywhere() -> None:
    def read(file: Mapping[str, object], **environ: str) -> int | None:
        return read_settings(SettingsOfNextYear, file, environ).max_scrub_bytes_per_s

    assert read({"storage": {"max_scrub_bytes_per_s": 7}}) == 7
    assert read({}, SHOAL_MAX_SCRUB_BYTES_PER_S="8") == 8
    command = with_changes_of(SettingsOfNextYear, Command)
    sent = decode(b'{"max_scrub_bytes_per_s":9}', command)
    assert checked_changes(SettingsOfNextYear, sent) == {"max_scrub_bytes_per_s": 9}
    assert by_section(SettingsOfNextYear, {"max_scrub_bytes_per_s": 9}) == {"storage": {"max_scrub_bytes_per_s": 9}}
    with pytest.raises(BadInput, match="max_scrub_bytes_per_s is 0: expected a whole number of bytes per second"):
        checked_changes(SettingsOfNextYear, command(max_scrub_bytes_per_s=0))
    assert with_values_of(SettingsOfNextYear, Command)(max_scrub_bytes_per_s=9).max_scrub_bytes_per_s == 9
    added = [s for s in settings_of(SettingsOfNextYear) if s.name == "max_scrub_bytes_per_s"]
    assert overridden_by_env(added, {"SHOAL_MAX_SCRUB_BYTES_PER_S": "8"}) == ["max_scrub_bytes_per_s"]
    assert help_of(added) == ["--max-scrub-rate RATE  limit for verifying blobs, like 20MB, or none"]
    assert (
        "| `max_scrub_bytes_per_s` | `SHOAL_MAX_SCRUB_BYTES_PER_S` | a whole number of bytes per second from 1, "
        "like `20000000` | no limit | limit for verifying blobs | `--max-scrub-rate` |"
    ) in render(added)


def help_of(settings: Iterable[Setting]) -> list[str]:
    """The help of a command that has these settings' flags."""
    app = new_app()

    @app.command(cls=CommandHelp)
    @setting_options(settings)
    def command(given: GivenSettings) -> int:
        return 0

    text = CliRunner().invoke(app, ["--help"]).output
    return [line.strip() for line in text.splitlines() if line.strip().startswith("--") and "--help" not in line]
