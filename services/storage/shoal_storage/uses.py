"""Who uses the models of this node, as of this moment."""

from __future__ import annotations

from shoal_common.errors import Unavailable
from shoal_common.messages.records import InstanceSpec
from shoal_common.service import Context
from shoal_common.watch import View, caught_up
from shoal_storage.evict import uses_of

CATCH_UP_S = 5.0


class Uses:
    """Looks at the instances that people have placed."""

    def __init__(self, context: Context, specs: View) -> None:
        self._context, self._specs = context, specs

    async def now(self) -> dict[str, str]:
        """The models in use here and an instance that uses each: one placed a moment ago counts (I4).

        Raises Unavailable.
        """
        try:
            await caught_up(self._context.nats, self._specs, CATCH_UP_S)
        except TimeoutError:
            raise Unavailable(
                "NATS does not say which instances use the models of this node; nothing was removed, try again"
            ) from None
        return uses_of((s for _, s in self._specs.items("instance.", InstanceSpec)), self._context.node)
