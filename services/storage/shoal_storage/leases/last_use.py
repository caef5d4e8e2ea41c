"""Who uses the models of this node, as of now."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from shoal_common.bus.kv_mirror import KvMirror, wait_caught_up
from shoal_common.errors import Unavailable
from shoal_common.messages.instances import InstanceSpec
from shoal_common.service import ServiceContext
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.ledger.usage import ModelUser, users_of

CATCH_UP_TIMEOUT_S = 5.0


class UsageView:
    """Finds the users of models: placed instances, and leases. `refresh_leases` finds which are alive."""

    def __init__(
        self, context: ServiceContext, specs: KvMirror, ledger: Ledger, refresh_leases: Callable[[], Awaitable[bool]]
    ) -> None:
        self._context, self._specs, self._ledger, self._refresh_leases = context, specs, ledger, refresh_leases

    async def current_users(self) -> dict[str, list[ModelUser]]:
        """Return the users of each model in use, including an instance placed a moment ago (I4).

        Removes ended leases with their views. Within the critical section. Raises Unavailable.
        """
        try:
            await wait_caught_up(self._context.nats, self._specs, CATCH_UP_TIMEOUT_S)
        except TimeoutError:
            raise Unavailable(
                "NATS did not answer which instances use the models of this node; nothing was removed, try again"
            ) from None
        await self._refresh_leases()
        specs = (s for _, s in self._specs.items("instance.", InstanceSpec))
        return users_of(specs, self._ledger.uses.leases.values(), self._context.node)
