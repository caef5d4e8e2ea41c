"""The supervisor's decisions."""

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_cli.node.children import restart_policy
from shoal_cli.node.children.restart_policy import ChildStatus, ExitHistory, decide_restart, describe_exit, readiness

times = st.floats(0, 1e9, allow_nan=False)
codes = st.integers(-64, 255)


@given(st.integers(0, 10**9), times, st.floats(0, 1e6), codes)
def test_the_delay_is_bounded_and_depends_only_on_its_arguments(
    ends: int, began_s: float, lived_s: float, code: int
) -> None:
    history = ExitHistory(began_s, ends)
    first = decide_restart(history, began_s + lived_s, code)
    assert restart_policy.RESTART_BACKOFF.first_s <= first.delay_s <= restart_policy.RESTART_BACKOFF.max_s
    assert first == decide_restart(history, began_s + lived_s, code)


@given(st.integers(0, 10**6), st.floats(0, 29), codes)
def test_the_delay_never_shrinks_while_a_child_exits_early(ends: int, lived_s: float, code: int) -> None:
    sooner = decide_restart(ExitHistory(0.0, ends), lived_s, code)
    later = decide_restart(ExitHistory(0.0, sooner.exits_in_a_row), lived_s, code)
    assert later.exits_in_a_row == sooner.exits_in_a_row + 1
    assert later.delay_s >= sooner.delay_s


def test_the_delay_doubles_from_a_fifth_of_a_second_to_ten() -> None:
    delays, ends = [], 0
    for _ in range(8):
        restart = decide_restart(ExitHistory(0.0, ends), 1.0, 1)
        delays.append(restart.delay_s)
        ends = restart.exits_in_a_row
    assert delays == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10])


@given(st.integers(0, 10**6), st.floats(30, 1e6))
def test_a_child_that_lived_30_s_restarts_with_the_first_delay(ends: int, lived_s: float) -> None:
    restart = decide_restart(ExitHistory(0.0, ends), lived_s, 1)
    assert (restart.delay_s, restart.exits_in_a_row) == (restart_policy.RESTART_BACKOFF.first_s, 1)


def test_a_claimed_service_is_reported_and_not_restarted() -> None:
    assert "is already this node's service" in describe_exit(9)
    assert decide_restart(ExitHistory(0.0, 0), 1.0, 9).delay_s == restart_policy.RESTART_BACKOFF.max_s


def test_an_incompatible_cluster_is_reported_and_not_retried() -> None:
    assert "an incompatible version" in describe_exit(10)
    assert decide_restart(ExitHistory(0.0, 0), 1.0, 10).delay_s == restart_policy.RESTART_BACKOFF.max_s
    refused = ChildStatus(name="a", phase="waiting", exits_in_a_row=1, last_exit_code=10)
    assert readiness([refused]) == "hopeless"


def test_a_signal_is_called_by_its_name() -> None:
    assert describe_exit(-9) == "killed by SIGKILL"
    assert describe_exit(-63) == "killed by signal 63"
    assert describe_exit(3) == "exit code 3"


def test_up_needs_every_child_and_fails_when_one_never_starts() -> None:
    up = ChildStatus(name="a", phase="ready", was_ready=True)
    coming = ChildStatus(name="b", phase="starting", exits_in_a_row=restart_policy.MAX_FAILED_STARTS - 1)
    broken = ChildStatus(name="c", phase="waiting", exits_in_a_row=restart_policy.MAX_FAILED_STARTS, last_exit_code=1)
    fallen = ChildStatus(name="d", phase="waiting", exits_in_a_row=9, last_exit_code=1, was_ready=True)
    assert readiness([up, up]) == "ready"
    assert readiness([up, coming]) == "waiting"
    assert readiness([up, coming, broken]) == "hopeless"
    assert readiness([up, fallen]) == "waiting"


@pytest.mark.parametrize(
    "module",
    [
        "node/children/restart_policy.py",
        "node/node_plan.py",
        "node/logs/nats_format.py",
        "render/progress.py",
        "render/storage_text.py",
    ],
)
def test_decisions_import_nothing_that_acts(module: str) -> None:
    source = Path(restart_policy.__file__).parents[2] / module
    names = [a.name for n in ast.walk(ast.parse(source.read_text())) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module or "" for n in ast.walk(ast.parse(source.read_text())) if isinstance(n, ast.ImportFrom)]
    acting = {"asyncio", "nats", "httpx2", "os", "time", "subprocess", "socket"}
    assert not acting & {n.split(".")[0] for n in names}
