"""Outcomes of commands: the first one of a command stands, whoever records another."""

from __future__ import annotations

import asyncio

from shoal_common.errors import Cancelled, NodeDown
from shoal_common.messages.envelope import Empty
from shoal_common.rpc.outcomes import Outcomes, make_outcome
from tests.harness.fresh import Fresh
from tests.harness.nats import NatsServer, joined


async def test_the_first_outcome_of_a_command_stands(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        outcomes, identity = Outcomes(here.buckets), fresh("id")
        assert await outcomes.get(identity) is None
        first = make_outcome(identity, "storage", "node-a", "pin", {"pinned": True})
        assert await outcomes.record(first) == first
        late = make_outcome(identity, "storage", "node-a", "pin", NodeDown("it is down"))
        assert await outcomes.record(late) == first == await outcomes.get(identity)


async def test_of_outcomes_recorded_at_once_all_see_the_same(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here, joined(nats) as other:
        identity = fresh("id")
        stand = await asyncio.gather(
            *(
                Outcomes(buckets).record(make_outcome(identity, "storage", "node-a", "pin", {"by": i}))
                for i, buckets in enumerate([here.buckets, other.buckets] * 4)
            )
        )
        assert {outcome.result["by"] for outcome in stand} == {stand[0].result["by"]}


def test_an_exception_is_a_failure_and_no_result_a_success() -> None:
    failed = make_outcome("id-1", "fetcher", "node-a", "download", Cancelled("it was cancelled"))
    assert not failed.ok and failed.error is not None and failed.error.code == "cancelled" and failed.result == {}
    for result in (None, Empty()):
        done = make_outcome("id-1", "storage", "node-a", "gc", result)
        assert done.ok and done.error is None and done.result == {}
