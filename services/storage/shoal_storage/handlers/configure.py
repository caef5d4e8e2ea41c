"""The commands `configure` and `reload`: storage's settings changed, first in their file and then in force."""

from __future__ import annotations

import asyncio

from shoal_common.concurrency.threads import start_daemon_call
from shoal_common.logs import StructuredLogger
from shoal_common.messages.storage import Configure, Reload
from shoal_common.settings.declaration import Value
from shoal_common.settings.node import StorageSettings
from shoal_common.settings.values import by_section, changeable, overridden_by_env, read_settings, values_by_key
from shoal_common.settings_file import change_settings
from shoal_storage.context import StorageContext
from shoal_storage.libraries.scanner import reject_overlap
from shoal_storage.libraries.service import LibraryService
from shoal_storage.settings import requested_changes, settings_warning
from shoal_storage.volume_manager import VolumeManager

log = StructuredLogger("storage")

CONFIGURE_DEADLINE_S = 30.0


class ConfigureCommand:
    """Handles `configure` and `reload`. Changes are applied one at a time."""

    def __init__(self, context: StorageContext, volumes: VolumeManager, libraries: LibraryService) -> None:
        self._context, self._service = context, context.service
        self._volumes, self._libraries = volumes, libraries
        self._lock = asyncio.Lock()

    async def configure(self, command: Configure, _: str) -> dict[str, object]:
        """Change settings: first in the file, so that a restart keeps what was acknowledged, then in force."""
        changes = requested_changes(command, self._service.environ)
        # Once begun it completes, even past the command's deadline: the file and the settings in force stay equal.
        return await self._context.service.detached.run(self._change(changes))

    async def reload(self, _: Reload, __: str) -> dict[str, object]:
        """Apply what a person has written into the file. Raises BadInput for what cannot be used."""
        return await self._context.service.detached.run(self._change({}))

    async def _change(self, changes: dict[str, Value]) -> dict[str, object]:
        async with self._lock:
            settings = await start_daemon_call(self._write, changes)  # it looks at volumes, which may hang
            before, self._context.settings = values_by_key(self._context.settings), settings
            await self._volumes.update()
            await self._libraries.use_libraries(settings.libraries)
            await self._context.publishing.publish()
            values = values_by_key(settings)
            if changed := {name: value for name, value in values.items() if value != before[name]}:
                await self._context.events.emit("settings_changed", settings=changed)
        log.info("settings changed", **changed)
        ledger, free = self._context.ledger, await asyncio.to_thread(self._context.store.free_bytes)
        warning = settings_warning(settings, ledger.used_bytes, ledger.reserved_bytes, free)
        result: dict[str, object] = {
            **values,
            "used_bytes": ledger.used_bytes,
            "overridden_by_env": overridden_by_env(changeable(StorageSettings), self._service.environ),
        }
        return result | ({"note": warning} if warning else {})

    def _write(self, changes: dict[str, Value]) -> StorageSettings:
        def accept(settings: dict[str, object]) -> StorageSettings:
            # Reads both sections whole: a fault made there since the start is refused now, not at the next start.
            new_settings = read_settings(StorageSettings, settings, self._service.environ)
            reject_overlap(new_settings.libraries, self._service.config.store)
            self._volumes.reject_unusable(new_settings)
            return new_settings

        return change_settings(self._service.config.home, by_section(StorageSettings, changes), accept)
