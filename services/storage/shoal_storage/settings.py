"""What storage makes of its settings: which changes it takes, and what it warns of."""

from __future__ import annotations

from collections.abc import Mapping

from shoal_common.errors import Refused
from shoal_common.messages.storage import Configure
from shoal_common.settings.declaration import Value
from shoal_common.settings.node import StorageSettings
from shoal_common.settings.values import changeable, checked_changes
from shoal_common.units import format_bytes


def requested_changes(command: Configure, environ: Mapping[str, str]) -> dict[str, Value]:
    """Return what `configure` changes, by key; None takes a value back. Raises BadInput, Refused for overridden ones.

    Changing an overridden setting would have no effect, so the whole command is refused.
    """
    changes = checked_changes(StorageSettings, command)
    for setting in changeable(StorageSettings):
        if setting.key in changes and environ.get(setting.variable):
            raise Refused(
                f"{setting.key} is set by the environment, which overrides the file: "
                f"unset {setting.variable} for storage and restart it; nothing was changed",
                variable=setting.variable,
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
