"""When forced stages are killed for memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_common.messages.liveness import NodeFacts
from shoal_inference.host_facts.oom_guard import oom_reason

GIB = 1 << 30


@given(st.integers(0, 64 * GIB), st.integers(1, 64 * GIB), st.sampled_from([None, 0, 1]))
def test_forced_stages_end_exactly_below_the_memory_floor(available: int, floor: int, pressure: int | None) -> None:
    facts = NodeFacts(memory_total_bytes=64 * GIB, memory_available_bytes=available, memory_pressure=pressure)
    assert (oom_reason(facts, floor) is not None) == (available < floor)


@pytest.mark.parametrize(("total", "floor"), [(64 * GIB, 64 * GIB // 50), (4 * GIB, 256 << 20)])
def test_the_floor_is_a_fiftieth_and_never_next_to_nothing(total: int, floor: int) -> None:
    assert oom_reason(NodeFacts(memory_total_bytes=total, memory_available_bytes=floor), None) is None
    reason = oom_reason(NodeFacts(memory_total_bytes=total, memory_available_bytes=floor - 1), None)
    assert reason is not None and reason.details["floor_bytes"] == floor


@pytest.mark.parametrize("pressure", [2, 3])
def test_high_memory_pressure_is_an_oom_reason_with_free_bytes(pressure: int) -> None:
    facts = NodeFacts(memory_total_bytes=GIB, memory_available_bytes=GIB, memory_pressure=pressure)
    reason = oom_reason(facts, 1)
    assert reason is not None and "high memory pressure" in reason.message
