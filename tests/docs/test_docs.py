"""The documents name only what exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("services/*/README.md"), *ROOT.glob("*/README.md")]
)
SOURCES = [
    p
    for top in ("libs", "services", "cli", "demo", "tests", "bench", "deploy", "tools")
    for p in (ROOT / top).rglob("*.py")
]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_of_a_page_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_that_a_page_names_exists(page: Path) -> None:
    for name in set(re.findall(r"[\w/]+\.py\b", page.read_text())):
        assert any(str(p).endswith(f"/{name}") for p in SOURCES), f"{page.name} names {name}"


@cache
def names_of_tests() -> set[str]:
    """Return the names of all test modules and test functions."""
    sources = [p for p in SOURCES if p.is_relative_to(ROOT / "tests")]
    return {name for p in sources for name in (p.stem, *re.findall(r"def (test_\w+)", p.read_text()))}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    """A page may cut a long name: `test_I3_…`."""
    for name, cut in set(re.findall(r"\b(test_\w+)(…|\*)?", page.read_text())):
        exists = any(n.startswith(name) for n in names_of_tests()) if cut else name in names_of_tests()
        assert exists, f"{page.name} names {name}"


def source_of(service: str, module: str) -> Path:
    """Return the source file of a module as docs/architecture.md names it: `fetcher: downloads/task.py`."""
    if service == "common":
        return ROOT / "libs" / "common" / "shoal_common" / module
    return ROOT / "services" / service / f"shoal_{service}" / module


def defined_in(source: Path) -> set[str]:
    """Return the names of the functions, methods and classes that a module defines."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, kinds)}


def table_below(heading: str) -> list[list[str]]:
    """Return the rows of the table below a heading of docs/architecture.md, by cells."""
    section = ARCHITECTURE.read_text().split(f"\n{heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return rows[2:]


def test_flow_pages_name_functions_that_exist() -> None:
    named = re.findall(r"`(\w+): ([\w/]+\.py)` ((?:`\w+`(?:, )?)+)", ARCHITECTURE.read_text())
    assert named
    for service, module, functions in named:
        missing = set(re.findall(r"`(\w+)`", functions)) - defined_in(source_of(service, module))
        assert not missing, f"{service}: {module} has no {', '.join(sorted(missing))}"


@pytest.mark.parametrize("flow", ["## A pull", "## A chat"])
def test_every_step_of_a_flow_names_where_it_happens(flow: str) -> None:
    steps = table_below(flow)
    assert len(steps) > 10
    for number, _, where in steps:
        for place in where.split("; "):
            assert re.fullmatch(r"`\w+: [\w/]+\.py` `\w+`(, `\w+`)*", place), f"step {number}: {place}"


def test_each_of_the_ten_questions_is_answered_by_code() -> None:
    questions = table_below("## Ten questions")
    assert len(questions) == 10
    for question, paths, names in questions:
        sources = [ROOT / path for path in re.findall(r"`([\w/]+\.py)`", paths)]
        wanted = re.findall(r"`(\w+)`", names)
        assert len(sources) == len(wanted) > 0, question
        for source, name in zip(sources, wanted, strict=True):
            assert source.is_file(), f"{question} {source} does not exist"
            assert name in defined_in(source), f"{question} {source} does not define {name}"


@pytest.mark.parametrize("service", ["common", *sorted(p.name for p in (ROOT / "services").iterdir() if p.is_dir())])
def test_the_map_lists_every_package_of_a_service(service: str) -> None:
    heading = "### libs/common" if service == "common" else f"### {service}"
    section = ARCHITECTURE.read_text().split(f"\n{heading}\n")[1].split("\n##")[0]
    listed = {
        name for name in re.findall(r"^\| `([\w/.]+)` \|", section, re.MULTILINE) if not re.match(r"stage/.", name)
    }
    top = source_of(service, "")
    modules = {p.name for p in top.glob("*.py") if not p.name.startswith("__")}
    packages = {f"{p.parent.name}/" for p in top.glob("*/__init__.py")}
    assert listed == modules | packages


def test_every_service_has_its_page_and_the_map_names_them_all() -> None:
    text = ARCHITECTURE.read_text()
    for service in (p for p in (ROOT / "services").iterdir() if p.is_dir()):
        assert (service / "README.md").exists()
        assert f"| {service.name} |" in text
