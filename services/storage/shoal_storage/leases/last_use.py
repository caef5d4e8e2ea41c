"""Who uses the models of this node, as of now."""

from __future__ import annotations

from shoal_common.bus.kv_mirror import wait_caught_up
from shoal_common.errors import Unavailable
from shoal_common.messages.instances import InstanceSpec
from shoal_common.names import ModelId
from shoal_storage.context import StorageContext
from shoal_storage.leases.service import LeaseService
from shoal_storage.ledger.usage import ModelUser, users_of
from shoal_storage.section import Held

CATCH_UP_TIMEOUT_S = 5.0


class UsageView:
    """Finds the users of models: placed instances, and leases."""

    def __init__(self, context: StorageContext, leases: LeaseService) -> None:
        self._context, self._leases = context, leases

    async def catch_up(self) -> None:
        """Learn of every instance placed so far (I4). Shortly before `current_users`, outside. Raises Unavailable."""
        try:
            await wait_caught_up(self._context.service.nats, self._context.specs, CATCH_UP_TIMEOUT_S)
        except TimeoutError:
            raise Unavailable(
                "NATS did not answer which instances use the models of this node; nothing was removed, try again"
            ) from None

    async def current_users(self, held: Held) -> dict[ModelId, list[ModelUser]]:
        """Return the users of each model in use. Removes ended leases with their views."""
        await self._leases.refresh(held)
        specs = (s for _, s in self._context.specs.items("instance.", InstanceSpec))
        return users_of(specs, self._context.ledger.uses.leases.values(), self._context.node)
