"""The node's settings that storage keeps: `[storage]`, `[transfer]` of node.toml, the environment, which wins. Pure.

[storage]
max_storage_bytes   SHOAL_MAX_STORAGE_BYTES   quota for blobs, present and promised    only the disk limits
eviction_policy     SHOAL_EVICTION_POLICY     manual refuses what does not fit, lru makes room      manual
headroom_bytes      SHOAL_HEADROOM_BYTES      space that stays free on the disk        1 GiB
partial_retention_s SHOAL_PARTIAL_RETENTION_S bytes that ended downloads left are kept seven days
reserve_bytes       SHOAL_RESERVE_BYTES       size of the reserve file; read at start  64 MiB
read_only_roots     SHOAL_READ_ONLY_ROOTS     directories whose models are offered as they are (as in PATH)   none
roots               SHOAL_ROOTS               directories on other disks for models to come to (as in PATH)   none
path                                          where the store is                       <home>/store

[transfer], whole numbers from 1; without one there is no limit
max_upload_bytes_per_s  SHOAL_MAX_UPLOAD_BYTES_PER_S  what the fileserver sends in all
max_hub_bytes_per_s     SHOAL_MAX_HUB_BYTES_PER_S     what the fetcher takes from the hub in all
max_peer_bytes_per_s    SHOAL_MAX_PEER_BYTES_PER_S    what the fetcher takes from each peer
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast, get_args

from msgspec import UNSET

from shoal_common.errors import BadInput, Refused
from shoal_common.messages.commands import Configure
from shoal_common.settings_file import Value
from shoal_storage.decide import EvictionPolicy, Limits, Rates, human
from shoal_storage.reserve import RESERVE_BYTES

DEFAULT_HEADROOM_BYTES = 1 << 30
VARIABLES = {
    "max_storage_bytes": "SHOAL_MAX_STORAGE_BYTES",
    "eviction_policy": "SHOAL_EVICTION_POLICY",
    "headroom_bytes": "SHOAL_HEADROOM_BYTES",
    "partial_retention_s": "SHOAL_PARTIAL_RETENTION_S",
    "read_only_roots": "SHOAL_READ_ONLY_ROOTS",
    "roots": "SHOAL_ROOTS",
    "max_upload_bytes_per_s": "SHOAL_MAX_UPLOAD_BYTES_PER_S",
    "max_hub_bytes_per_s": "SHOAL_MAX_HUB_BYTES_PER_S",
    "max_peer_bytes_per_s": "SHOAL_MAX_PEER_BYTES_PER_S",
}
"""Each setting that can be changed, and the variable that wins over it."""
RATES = ("max_upload_bytes_per_s", "max_hub_bytes_per_s", "max_peer_bytes_per_s")
"""Those of them that are in `[transfer]`; the others are in `[storage]`."""
DEFAULT_RETENTION_S = 7 * 86400
MOST_ROOTS = {"read_only_roots": 64, "roots": 16}
_BETWEEN_ROOTS = ":"
"""As in PATH (`os.pathsep`)."""
_RESERVE = "reserve_bytes"
_RESERVE_VARIABLE = "SHOAL_RESERVE_BYTES"
_MOST = (1 << 63) - 1


def read_limits(settings: Mapping[str, object], environ: Mapping[str, str]) -> Limits:
    """The limits of this node, from the parsed node.toml and the environment. Raises BadInput naming the setting."""
    section, transfer = _section(settings, "storage"), _section(settings, "transfer")
    if not isinstance(section.get("path", ""), str):
        raise BadInput(f"storage.path in node.toml is {section['path']!r}: a path in quotes is expected")
    headroom = _bytes("headroom_bytes", section, environ)
    retention = _seconds("partial_retention_s", section, environ)
    read_reserve_bytes(settings, environ)
    return Limits(
        quota_bytes=_bytes("max_storage_bytes", section, environ),
        headroom_bytes=DEFAULT_HEADROOM_BYTES if headroom is None else headroom,
        eviction_policy=_policy(section, environ),
        partial_retention_s=DEFAULT_RETENTION_S if retention is None else retention,
        read_only_roots=_roots("read_only_roots", section, environ),
        roots=_roots("roots", section, environ),
        transfer=Rates(**{name: _rate(name, transfer, environ) for name in RATES}),
    )


def _section(settings: Mapping[str, object], name: str) -> Mapping[str, object]:
    section = settings.get(name, {})
    if not isinstance(section, Mapping):
        raise BadInput(f"{name} in node.toml is {section!r}: a section [{name}] is expected")
    return section


def read_reserve_bytes(settings: Mapping[str, object], environ: Mapping[str, str]) -> int:
    """The size of the reserve file: from a checked node.toml and the environment, once at start. 0: none."""
    stated = _bytes(_RESERVE, _section(settings, "storage"), environ)
    return RESERVE_BYTES if stated is None else stated


def _stated(name: str, section: Mapping[str, object], environ: Mapping[str, str]) -> tuple[str, object]:
    variable = _RESERVE_VARIABLE if name == _RESERVE else VARIABLES[name]
    where = f"{'transfer' if name in RATES else 'storage'}.{name}"
    return (variable, environ[variable]) if environ.get(variable) else (where, section.get(name))


def _bytes(name: str, section: Mapping[str, object], environ: Mapping[str, str]) -> int | None:
    return _number(name, "bytes is expected, for example 500000000000", section, environ)


def _rate(name: str, section: Mapping[str, object], environ: Mapping[str, str]) -> int | None:
    rate = _number(name, "bytes per second from 1 is expected, for example 20000000", section, environ)
    if rate == 0:
        where, _ = _stated(name, section, environ)
        raise BadInput(f"{where} is 0: leave it out for no limit, or pause what shall not move")
    return rate


def _seconds(name: str, section: Mapping[str, object], environ: Mapping[str, str]) -> int | None:
    return _number(name, "seconds is expected, for example 604800 for seven days", section, environ)


def _number(name: str, of_what: str, section: Mapping[str, object], environ: Mapping[str, str]) -> int | None:
    where, value = _stated(name, section, environ)
    if value is None:
        return None
    text = str(value)
    if isinstance(value, bool) or not (text.isascii() and text.isdigit()):
        raise BadInput(f"{where} is {value!r}: a whole number of {of_what}")
    return int(text)


def _policy(section: Mapping[str, object], environ: Mapping[str, str]) -> EvictionPolicy:
    where, value = _stated("eviction_policy", section, environ)
    if value is None:
        return "manual"
    if value not in get_args(EvictionPolicy):
        raise BadInput(f'{where} is {value!r}: "manual" and "lru" are possible')
    return cast(EvictionPolicy, value)


def _roots(name: str, section: Mapping[str, object], environ: Mapping[str, str]) -> tuple[str, ...]:
    where, value = _stated(name, section, environ)
    if value is None:
        return ()
    roots = [r for r in value.split(_BETWEEN_ROOTS) if r] if where in environ and isinstance(value, str) else value
    if not isinstance(roots, list):
        raise BadInput(f'{where} is {value!r}: a list of directories is expected, ["/mnt/models"]')
    if len(roots) > MOST_ROOTS[name]:
        raise BadInput(f"{where} has {len(roots)} directories: {MOST_ROOTS[name]} at most are possible")
    for root in roots:
        if not isinstance(root, str) or not root.startswith(("/", "~")) or not root.isprintable():
            raise BadInput(f"{where} has {root!r}: the absolute path of a directory is expected, or one with ~")
    return tuple(dict.fromkeys(roots))


def overridden(environ: Mapping[str, str]) -> list[str]:
    """The settings that the environment holds, against which the file is of no use."""
    return [name for name, variable in VARIABLES.items() if environ.get(variable)]


def by_section(changes: Mapping[str, Value]) -> dict[str, dict[str, Value]]:
    """Changes by the section of the file that they belong to."""
    found: dict[str, dict[str, Value]] = {}
    for name, value in changes.items():
        found.setdefault("transfer" if name in RATES else "storage", {})[name] = value
    return found


def changes_of(command: Configure, environ: Mapping[str, str]) -> dict[str, Value]:
    """What `configure` changes in the file; None takes a key away. Raises BadInput; Refused for the overridden.

    Asking for what the environment holds would be a change without effect, so it is refused, all of it.
    """
    asked = {name: getattr(command, name) for name in VARIABLES}
    changes = {name: value for name, value in asked.items() if value is not UNSET}
    if not changes:
        raise BadInput(f"configure changes nothing: give at least one of {', '.join(VARIABLES)}")
    for name in MOST_ROOTS:
        if isinstance(changes.get(name), list):
            _roots(name, changes, {})
            changes[name] = changes[name] or None
    for name, value in changes.items():
        least = 1 if name in RATES else 0
        if isinstance(value, int) and not least <= value <= _MOST:
            unit = "bytes per second" if name in RATES else "seconds" if name.endswith("_s") else "bytes"
            raise BadInput(f"{name} is {value}: a whole number of {unit} from {least} is expected", param=name)
        if environ.get(VARIABLES[name]):
            raise Refused(
                f"{name} comes from the environment here, which wins over the file: unset {VARIABLES[name]} for "
                "storage and restart it; nothing was changed",
                variable=VARIABLES[name],
            )
    return changes


def remark(limits: Limits, used_bytes: int, reserved_bytes: int, free_bytes: int) -> str:
    """What a person who set these limits had better know, or ""."""
    taken = used_bytes + reserved_bytes
    if limits.quota_bytes is not None and taken > limits.quota_bytes:
        then = (
            "what comes next makes room first"
            if limits.eviction_policy == "lru"
            else "nothing comes in until models are removed with `shoal rm`"
        )
        return (
            f"{human(taken)} are used or promised already, more than the quota of {human(limits.quota_bytes)}: "
            f"nothing is removed for that, and {then}"
        )
    if free_bytes < limits.headroom_bytes:
        return (
            f"the disk has {human(free_bytes)} free, less than the {human(limits.headroom_bytes)} that shall stay "
            "free: nothing comes in until there is more"
        )
    return ""
