"""The documents name only what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("services/*/README.md"), *ROOT.glob("deploy/*.md")]
)
SOURCES = [
    p for top in ("libs", "services", "cli", "demo", "tests", "bench", "deploy") for p in (ROOT / top).rglob("*.py")
]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_of_a_page_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_that_a_page_names_exists(page: Path) -> None:
    for name in set(re.findall(r"[\w/]+\.py\b", page.read_text())):
        assert any(str(p).endswith(f"/{name}") for p in SOURCES), f"{page.name} names {name}"


def test_flow_pages_name_functions_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for module, functions in re.findall(r"`(?:\w+: )?([\w/]+\.py)` ((?:`\w+`(?:, )?)+)", text):
        candidates = [p.read_text() for p in SOURCES if str(p).endswith(f"/{module}") and "/tests/" not in str(p)]
        for function in re.findall(r"`(\w+)`", functions):
            assert any(f"def {function}(" in source for source in candidates), f"{module} has no {function}"


def test_every_service_has_its_page_and_the_map_names_them_all() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for service in (p for p in (ROOT / "services").iterdir() if p.is_dir()):
        assert (service / "README.md").exists()
        assert f"| {service.name} |" in text
