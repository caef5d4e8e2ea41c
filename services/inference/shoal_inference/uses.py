"""Telling storage that a model was used: what was used last is evicted last.

The host of rank 0 tells every node that runs a stage of the instance, when an answer begins and at most once a minute
for each model. A last use may so be up to a minute early, and a long answer counts from its beginning; while it runs,
its instance keeps the model anyway.
"""

from __future__ import annotations

import asyncio

from nats.errors import Error as NatsError

from shoal_common.errors import ShoalError
from shoal_common.logs import Log
from shoal_common.messages.questions import Done, NoteUse
from shoal_common.messages.records import InstanceSpec
from shoal_common.questions import Ask

log = Log("uses")

_SAY_EVERY_S = 60.0
_DEADLINE_S = 5.0


class Uses:
    """Says it without anybody waiting. What cannot be said is logged, and a later answer tries again."""

    def __init__(self, ask: Ask, tasks: asyncio.TaskGroup) -> None:
        self._ask, self._tasks = ask, tasks
        self._said_s: dict[str, float] = {}

    def note(self, spec: InstanceSpec, now_s: float) -> None:
        """An answer of this instance has begun. `now_s` is of a clock that never goes back."""
        # Forgetting the old ones bounds this by the models used within a minute.
        self._said_s = {m: said_s for m, said_s in self._said_s.items() if now_s - said_s < _SAY_EVERY_S}
        if spec.model in self._said_s:
            return
        self._said_s[spec.model] = now_s
        for node in {stage.node for stage in spec.stages}:
            self._tasks.create_task(self._say(node, spec.model))

    async def _say(self, node: str, model: str) -> None:
        try:
            await self._ask("storage", node, "used", NoteUse(models=[model]), Done, deadline_s=_DEADLINE_S)
        except (ShoalError, NatsError) as e:
            log.warning("a use was not noted", node=node, model=model, why=str(e) or type(e).__name__)
