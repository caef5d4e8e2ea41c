"""A store for a test, checked when the test ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.storage.store_fixtures import Model, check_invariants


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """The path of a store. Whatever a test does to it, I1 and I2 hold at its end."""
    yield tmp_path / "store"
    check_invariants(tmp_path / "store")


@pytest.fixture
def apples() -> Model:
    """A model with a file in a subdirectory, an empty file, and a file that the hub names by its git sha1."""
    return Model(
        "org/apples",
        {"config.json": b"{}", "sub/weights.bin": b"w" * 3000, "empty": b"", "shared.bin": b"both have these" * 50},
        by_git=("config.json",),
    )


@pytest.fixture
def pears() -> Model:
    """A model that shares a blob with `apples`."""
    return Model("org/pears", {"pears.bin": b"p" * 2000, "other-name.bin": b"both have these" * 50})
