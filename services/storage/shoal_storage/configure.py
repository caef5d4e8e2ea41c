"""The command `configure`: what a node's storage keeps of its settings, in their file first and then in force."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec

from shoal_common.logs import Log
from shoal_common.messages.commands import Configure
from shoal_common.service import Context
from shoal_common.settings_file import Value, change_settings
from shoal_storage.decide import Ledger, Limits
from shoal_storage.disk import Disk
from shoal_storage.limits import by_section, changes_of, overridden, read_limits, remark
from shoal_storage.roots import refuse_overlap

log = Log("storage")

CONFIGURE_DEADLINE_S = 30.0


class Settings:
    """The settings of one node's storage. Changes are made one after the other."""

    def __init__(
        self,
        context: Context,
        disk: Disk,
        ledger: Ledger,
        use: Callable[[Limits], Awaitable[None]],
        publish: Callable[[], Awaitable[None]],
        refuse: Callable[[Limits], None],
    ) -> None:
        self._context, self._disk, self._ledger = context, disk, ledger
        self._use, self._publish, self._refuse = use, publish, refuse
        self._one_at_a_time = asyncio.Lock()
        self._changing: set[asyncio.Task[dict[str, object]]] = set()

    async def configure(self, command: Configure, _: str) -> dict[str, object]:
        """Change settings: first in the file, so that a restart keeps what was acknowledged, then at once."""
        changes = changes_of(command, self._context.environ)
        # Once begun it is finished, though the command's deadline pass: the file and what is in force stay one.
        changing = asyncio.create_task(self._change(changes))
        self._changing.add(changing)
        changing.add_done_callback(self._changing.discard)
        return await asyncio.shield(changing)

    async def _change(self, changes: dict[str, Value]) -> dict[str, object]:
        async with self._one_at_a_time:
            limits = await asyncio.to_thread(self._write, changes)
            await self._use(limits)
            await self._publish()
        log.info("configured", **changes)
        free = await asyncio.to_thread(self._disk.free_bytes)
        note = remark(limits, self._ledger.used_bytes, self._ledger.reserved_bytes, free)
        result: dict[str, object] = {
            "max_storage_bytes": limits.quota_bytes,
            "eviction_policy": limits.eviction_policy,
            "headroom_bytes": limits.headroom_bytes,
            "partial_retention_s": limits.partial_retention_s,
            "read_only_roots": list(limits.read_only_roots),
            "roots": list(limits.roots),
            **msgspec.to_builtins(limits.transfer),
            "used_bytes": self._ledger.used_bytes,
            "from_environment": overridden(self._context.environ),
        }
        return result | ({"note": note} if note else {})

    def _write(self, changes: dict[str, Value]) -> Limits:
        def accept(settings: dict[str, object]) -> Limits:
            # All of both sections: a fault made there since the start is refused now, not at a restart.
            limits = read_limits(settings, self._context.environ)
            refuse_overlap(limits.read_only_roots, self._context.config.store)
            self._refuse(limits)
            return limits

        return change_settings(self._context.config.home, by_section(changes), accept)
