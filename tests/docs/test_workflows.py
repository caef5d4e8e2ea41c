"""What .github and the hooks run, and send people to, exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted(GITHUB.glob("workflows/*.yml"))
FORMS = sorted(GITHUB.glob("ISSUE_TEMPLATE/[bf]*.yml"))
HOOKS = ROOT / ".pre-commit-config.yaml"


def targets() -> set[str]:
    """Return the targets of the Makefile."""
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("file", [*WORKFLOWS, HOOKS], ids=lambda p: p.stem)
def test_a_workflow_makes_only_targets_that_exist(file: Path) -> None:
    made = set(re.findall(r"(?:run|entry): make ([\w-]+)$", file.read_text(), re.MULTILINE))
    assert made and made <= targets()


def test_hooks_check_all_that_lint_and_types_do() -> None:
    entries = re.findall(r"entry: (.+)$", HOOKS.read_text(), re.MULTILINE)
    lint = (ROOT / "Makefile").read_text().split("\nlint: setup\n")[1].split("\n\n")[0]
    programs = set(re.findall(r"\$\(BIN\)/([\w-]+)", lint))
    assert programs <= {word.removeprefix(".venv/bin/") for entry in entries for word in entry.split()}
    assert "make types" in entries


def test_a_bug_report_asks_for_what_a_search_needs() -> None:
    text = (GITHUB / "ISSUE_TEMPLATE" / "bug.yml").read_text()
    assert all(word in text for word in ("`shoal doctor`", "`shoal version`", "`shoal logs SERVICE`", "HF_TOKEN"))


@pytest.mark.parametrize("form", FORMS, ids=lambda p: p.stem)
def test_a_form_names_only_commands_and_pages_that_exist(form: Path) -> None:
    text = form.read_text()
    commands = {p.stem for p in (ROOT / "cli" / "shoal_cli" / "commands").glob("*.py")}
    assert set(re.findall(r"`shoal ([a-z]+)", text)) <= commands
    pages = re.findall(r"\b(?:docs/[\w/.]+\w|[A-Z]+\.md)", text)
    assert pages and not [page for page in pages if not (ROOT / page).exists()]
