"""docs/decisions/ has an index that lists every page, and pages of one form."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DECISIONS = ROOT / "docs" / "decisions"
PAGES = sorted(DECISIONS.glob("[0-9]*.md"))
HEADINGS = ["Context", "Decision", "Consequences", "What would make us change it"]
MAX_LINES = 40


def test_the_index_lists_every_decision_once_in_order() -> None:
    listed = re.findall(r"^\| \[(\d+)\]\((\S+)\) \|", (DECISIONS / "README.md").read_text(), re.MULTILINE)
    assert [name for _, name in listed] == [page.name for page in PAGES]
    assert [int(number) for number, _ in listed] == list(range(1, len(PAGES) + 1))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_decision_has_its_number_and_the_four_headings(page: Path) -> None:
    lines = page.read_text().splitlines()
    assert lines[0].startswith(f"# {int(page.name[:4])}. ")
    assert [line.removeprefix("## ") for line in lines if line.startswith("## ")] == HEADINGS
    assert len(lines) <= MAX_LINES
