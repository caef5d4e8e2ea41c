"""Tests that wait run beside tests that compute, and unit tests fill up what is left at the end."""

from __future__ import annotations

from pathlib import Path

from tests.harness.order import in_order

CLUSTER, SERVICE, UNIT = Path("tests/cluster"), Path("tests/storage/service"), Path("tests/storage/unit")


def test_directories_take_turns_and_unit_tests_come_last() -> None:
    files = [
        UNIT / "test_a.py",
        *(CLUSTER / f"test_{n}.py" for n in "abc"),
        *(SERVICE / f"test_{n}.py" for n in "xyz"),
    ]
    assert in_order(files) == [
        CLUSTER / "test_a.py",
        SERVICE / "test_x.py",
        CLUSTER / "test_b.py",
        SERVICE / "test_y.py",
        CLUSTER / "test_c.py",
        SERVICE / "test_z.py",
        UNIT / "test_a.py",
    ]


def test_a_larger_directory_is_spread_over_the_whole_run() -> None:
    files = [*(CLUSTER / f"test_{n}.py" for n in "ab"), *(SERVICE / f"test_{n}.py" for n in "uvwxyz")]
    order = [path.parent for path in in_order(files)]
    assert order == [SERVICE, CLUSTER, SERVICE, SERVICE, SERVICE, CLUSTER, SERVICE, SERVICE]
