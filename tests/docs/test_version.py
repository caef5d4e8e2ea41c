"""The version is spelled once, and everything that states one agrees."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager

from shoal_common import VERSION
from shoal_common.liveness.compatibility import are_compatible

ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = sorted(p.parent for p in [*ROOT.glob("*/pyproject.toml"), *ROOT.glob("*/*/pyproject.toml")])


def test_every_distribution_is_found() -> None:
    names = {p.name for p in DISTRIBUTIONS}
    assert names == {"common", "cli", "demo", *(p.name for p in (ROOT / "services").iterdir() if p.is_dir())}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda p: p.name)
def test_a_distribution_is_built_in_the_common_version(distribution: Path) -> None:
    """As a build of its wheel computes it; the others of this repository are required in exactly this version."""
    metadata = ProjectMetadata(str(distribution), PluginManager())
    assert metadata.version == VERSION
    internal = {d for d in metadata.core.dependencies if d.startswith("shoal-")}
    assert internal == ({f"shoal-common=={VERSION}"} if "shoal-common" in requirements(distribution) else set())


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda p: p.name)
def test_a_distribution_spells_no_version_of_its_own(distribution: Path) -> None:
    pyproject = tomllib.loads((distribution / "pyproject.toml").read_text())
    assert "version" not in pyproject["project"]
    pinned = [name for name in requirements(distribution) if re.search(r"[=<>~!]", name)]
    assert not [name for name in pinned if name.startswith("shoal-")]


def requirements(distribution: Path) -> list[str]:
    """Return the requirements that a pyproject.toml lists, for the hook or as they are."""
    pyproject = tomllib.loads((distribution / "pyproject.toml").read_text())
    hooks = pyproject["tool"]["hatch"].get("metadata", {}).get("hooks", {})
    return list(hooks["custom"]["dependencies"] if hooks else pyproject["project"]["dependencies"])


def test_the_changelog_begins_with_the_version() -> None:
    headings = re.findall(r"^## (\S+?)(?:,.*)?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == VERSION


def test_the_version_is_one_that_services_can_compare() -> None:
    assert are_compatible(VERSION, VERSION)
