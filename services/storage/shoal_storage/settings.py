"""Storage's settings: read from node.toml and the environment, changed by a command."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast, get_args

import msgspec
from msgspec import UNSET

from shoal_common.errors import BadInput, Refused
from shoal_common.messages.storage import Configure
from shoal_common.settings_file import Value
from shoal_common.units import format_bytes

DEFAULT_HEADROOM_BYTES = 1 << 30
ENVIRONMENT_VARIABLES = {
    "max_storage_bytes": "SHOAL_MAX_STORAGE_BYTES",
    "eviction_policy": "SHOAL_EVICTION_POLICY",
    "headroom_bytes": "SHOAL_HEADROOM_BYTES",
    "partial_retention_s": "SHOAL_PARTIAL_RETENTION_S",
    "libraries": "SHOAL_LIBRARIES",
    "volumes": "SHOAL_VOLUMES",
    "max_upload_bytes_per_s": "SHOAL_MAX_UPLOAD_BYTES_PER_S",
    "max_hub_bytes_per_s": "SHOAL_MAX_HUB_BYTES_PER_S",
    "max_peer_bytes_per_s": "SHOAL_MAX_PEER_BYTES_PER_S",
}
"""Each setting that can be changed, and the environment variable that overrides it."""
RATE_LIMITS = ("max_upload_bytes_per_s", "max_hub_bytes_per_s", "max_peer_bytes_per_s")
"""The settings in `[transfer]`; the others are in `[storage]`."""
DEFAULT_RETENTION_S = 7 * 86400
MAX_DIRECTORIES = {"libraries": 64, "volumes": 16}
_PATH_SEPARATOR = ":"
"""`os.pathsep`."""
_BALLAST_SETTING = "ballast_bytes"
_BALLAST_VARIABLE = "SHOAL_BALLAST_BYTES"
_MAX_NUMBER = (1 << 63) - 1


def read_settings(settings: Mapping[str, object], environ: Mapping[str, str]) -> StorageSettings:
    """Return the settings from the parsed node.toml and the environment. Raises BadInput naming the setting."""
    section, transfer = _section(settings, "storage"), _section(settings, "transfer")
    if not isinstance(section.get("path", ""), str):
        raise BadInput(f"storage.path in node.toml is {section['path']!r}: expected a path in quotes")
    headroom = _bytes("headroom_bytes", section, environ)
    retention = _seconds("partial_retention_s", section, environ)
    read_ballast_bytes(settings, environ)
    return StorageSettings(
        quota_bytes=_bytes("max_storage_bytes", section, environ),
        headroom_bytes=DEFAULT_HEADROOM_BYTES if headroom is None else headroom,
        eviction_policy=_policy(section, environ),
        partial_retention_s=DEFAULT_RETENTION_S if retention is None else retention,
        libraries=_directories("libraries", section, environ),
        volumes=_directories("volumes", section, environ),
        transfer=TransferLimits(**{name: _rate(name, transfer, environ) for name in RATE_LIMITS}),
    )


def _section(settings: Mapping[str, object], name: str) -> Mapping[str, object]:
    section = settings.get(name, {})
    if not isinstance(section, Mapping):
        raise BadInput(f"{name} in node.toml is {section!r}: expected a section [{name}]")
    return section


def read_ballast_bytes(settings: Mapping[str, object], environ: Mapping[str, str]) -> int:
    """Return the size of the ballast file from a checked node.toml and the environment, once at start. 0: none."""
    configured = _bytes(_BALLAST_SETTING, _section(settings, "storage"), environ)
    return DEFAULT_BALLAST_BYTES if configured is None else configured


def _configured_value(name: str, section: Mapping[str, object], environ: Mapping[str, str]) -> tuple[str, object]:
    variable = _BALLAST_VARIABLE if name == _BALLAST_SETTING else ENVIRONMENT_VARIABLES[name]
    source = f"{'transfer' if name in RATE_LIMITS else 'storage'}.{name}"
    return (variable, environ[variable]) if environ.get(variable) else (source, section.get(name))


def _bytes(name: str, section: Mapping[str, object], environ: Mapping[str, str]) -> int | None:
    return _number(name, "bytes, for example 500000000000", section, environ)


def _rate(name: str, section: Mapping[str, object], environ: Mapping[str, str]) -> int | None:
    rate = _number(name, "bytes per second from 1, for example 20000000", section, environ)
    if rate == 0:
        source, _ = _configured_value(name, section, environ)
        raise BadInput(f"{source} is 0: leave it out for no limit, or pause the downloads")
    return rate


def _seconds(name: str, section: Mapping[str, object], environ: Mapping[str, str]) -> int | None:
    return _number(name, "seconds, for example 604800 for seven days", section, environ)


def _number(name: str, unit: str, section: Mapping[str, object], environ: Mapping[str, str]) -> int | None:
    source, value = _configured_value(name, section, environ)
    if value is None:
        return None
    text = str(value)
    if isinstance(value, bool) or not (text.isascii() and text.isdigit()):
        raise BadInput(f"{source} is {value!r}: expected a whole number of {unit}")
    return int(text)


def _policy(section: Mapping[str, object], environ: Mapping[str, str]) -> EvictionPolicy:
    source, value = _configured_value("eviction_policy", section, environ)
    if value is None:
        return "manual"
    if value not in get_args(EvictionPolicy):
        raise BadInput(f'{source} is {value!r}: expected "manual" or "lru"')
    return cast(EvictionPolicy, value)


def _directories(name: str, section: Mapping[str, object], environ: Mapping[str, str]) -> tuple[str, ...]:
    source, value = _configured_value(name, section, environ)
    if value is None:
        return ()
    paths = [r for r in value.split(_PATH_SEPARATOR) if r] if source in environ and isinstance(value, str) else value
    if not isinstance(paths, list):
        raise BadInput(f'{source} is {value!r}: expected a list of directories, for example ["/mnt/models"]')
    if len(paths) > MAX_DIRECTORIES[name]:
        raise BadInput(f"{source} has {len(paths)} directories: at most {MAX_DIRECTORIES[name]} are allowed")
    for path in paths:
        if not isinstance(path, str) or not path.startswith(("/", "~")) or not path.isprintable():
            raise BadInput(f"{source} has {path!r}: expected the absolute path of a directory, or one with ~")
    return tuple(dict.fromkeys(paths))


def overridden_settings(environ: Mapping[str, str]) -> list[str]:
    """Return the settings that environment variables override."""
    return [name for name, variable in ENVIRONMENT_VARIABLES.items() if environ.get(variable)]


def group_by_section(changes: Mapping[str, Value]) -> dict[str, dict[str, Value]]:
    """Group changes by the section of the file that they belong to."""
    sections: dict[str, dict[str, Value]] = {}
    for name, value in changes.items():
        sections.setdefault("transfer" if name in RATE_LIMITS else "storage", {})[name] = value
    return sections


def requested_changes(command: Configure, environ: Mapping[str, str]) -> dict[str, Value]:
    """Return what `configure` changes in the file; None removes a key. Raises BadInput, Refused for overridden ones.

    Changing an overridden setting would have no effect, so the whole command is refused.
    """
    requested = {name: getattr(command, name) for name in ENVIRONMENT_VARIABLES}
    changes = {name: value for name, value in requested.items() if value is not UNSET}
    if not changes:
        raise BadInput(f"configure changes nothing: give at least one of {', '.join(ENVIRONMENT_VARIABLES)}")
    for name in MAX_DIRECTORIES:
        if isinstance(changes.get(name), list):
            _directories(name, changes, {})
            changes[name] = changes[name] or None
    for name, value in changes.items():
        minimum = 1 if name in RATE_LIMITS else 0
        if isinstance(value, int) and not minimum <= value <= _MAX_NUMBER:
            unit = "bytes per second" if name in RATE_LIMITS else "seconds" if name.endswith("_s") else "bytes"
            raise BadInput(f"{name} is {value}: expected a whole number of {unit} from {minimum}", param=name)
        if environ.get(ENVIRONMENT_VARIABLES[name]):
            raise Refused(
                f"{name} is set by the environment, which overrides the file: "
                f"unset {ENVIRONMENT_VARIABLES[name]} for storage and restart it; nothing was changed",
                variable=ENVIRONMENT_VARIABLES[name],
            )
    return changes


def settings_warning(settings: StorageSettings, used_bytes: int, reserved_bytes: int, free_bytes: int) -> str:
    """Return a warning about settings that keep models from coming in, or ""."""
    committed_bytes = used_bytes + reserved_bytes
    if settings.quota_bytes is not None and committed_bytes > settings.quota_bytes:
        consequence = (
            "new downloads evict models first"
            if settings.eviction_policy == "lru"
            else "new downloads are refused until models are removed with `shoal rm`"
        )
        return (
            f"{format_bytes(committed_bytes)} are used or reserved, more than the quota of "
            f"{format_bytes(settings.quota_bytes)}: "
            f"nothing is removed, and {consequence}"
        )
    if free_bytes < settings.headroom_bytes:
        return (
            f"the disk has {format_bytes(free_bytes)} free, less than the headroom of "
            f"{format_bytes(settings.headroom_bytes)}: "
            "nothing can arrive until more is free"
        )
    return ""


EvictionPolicy = Literal["manual", "lru"]


class TransferLimits(msgspec.Struct, frozen=True):
    """Rate limits for a node's transfers. None: unlimited. Enforced by the fetcher and the fileserver."""

    max_upload_bytes_per_s: int | None = None
    max_hub_bytes_per_s: int | None = None
    max_peer_bytes_per_s: int | None = None


class StorageSettings(msgspec.Struct, frozen=True):
    """A node's storage settings. `quota_bytes` None: only the disk limits."""

    quota_bytes: int | None
    headroom_bytes: int
    eviction_policy: EvictionPolicy = "manual"
    partial_retention_s: int = 7 * 86400
    """How long the bytes of an abandoned download are kept."""
    libraries: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    """Volumes, as configured."""
    transfer: TransferLimits = TransferLimits()


DEFAULT_BALLAST_BYTES = 64 << 20
