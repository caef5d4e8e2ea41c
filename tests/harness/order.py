"""A pytest plugin: the order of test files, for workers that take them one after another.

Tests of whole clusters wait most of their time, and those of the store compute. In the order of their names all
workers would wait together, and then all would compete for the cores. So directories take turns; and unit tests,
which are short, come last, where they fill up what is left.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest


def in_order(files: Iterable[Path]) -> list[Path]:
    """Return test files in the order to run them: each directory's evenly spread, unit tests last."""
    by_directory: dict[Path, list[Path]] = defaultdict(list)
    for file in files:
        by_directory[file.parent].append(file)
    positions = {
        file: (directory.name == "unit", (number + 0.5) / len(members), str(file))
        for directory, members in by_directory.items()
        for number, file in enumerate(members)
    }
    return sorted(positions, key=lambda file: positions[file])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files; tests stay in the order of their file."""
    order = {file: number for number, file in enumerate(in_order(dict.fromkeys(item.path for item in items)))}
    items.sort(key=lambda item: order[item.path])
