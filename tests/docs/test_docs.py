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
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("services/*/README.md"), *ROOT.glob("*/README.md")]
)
SOURCES = [
    p
    for top in ("libs", "services", "cli", "demo", "tests", "bench", "deploy", "tools", "scripts", "examples")
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


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    """A path is in backticks, has a slash, and begins with a file or a directory at the top of the repository."""
    tops = {p.name for p in ROOT.iterdir()}
    named = {n for n in re.findall(r"`([\w.-]+/[\w./-]+)`", page.read_text()) if n.split("/")[0] in tops}
    assert not {name for name in named if not (ROOT / name).exists()}


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


def imports_between_packages(service: str, inside: str = "") -> dict[str, set[str]]:
    """Return what each package and module at the top of a service, or inside one of its packages, imports there."""
    top = source_of(service, inside)
    prefix = ".".join(("shoal_" + service, *filter(None, [inside]))) + "."
    found: dict[str, set[str]] = {}
    for source in top.rglob("*.py"):
        part = source.relative_to(top).with_suffix("").parts[0]
        if part in ("__init__", "__main__"):
            continue
        imported = found.setdefault(part, set())
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                imported |= {name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)}
    # What is imported may be a module or a name of one: keep what is a part of the service.
    return {part: (imported & found.keys()) - {part} for part, imported in found.items()}


@pytest.mark.parametrize(
    ("heading", "service", "inside"),
    [
        ("### libs/common", "common", ""),
        *((f"### {p.name}", p.name, "") for p in sorted((ROOT / "services").iterdir()) if p.is_dir()),
        ("### inference", "inference", "stage"),
    ],
)
def test_the_map_lists_every_package_and_what_it_imports(heading: str, service: str, inside: str) -> None:
    section = ARCHITECTURE.read_text().split(f"\n{heading}\n")[1].split("\n##")[0]
    listed = {}
    for name, cell in re.findall(r"^\| `([\w/.]+)` \| .* \| ([^|]*) \|$", section, re.MULTILINE):
        part = name.removesuffix(".py").removesuffix("/")
        if ("/" in part) == bool(inside):
            listed[part.removeprefix(f"{inside}/")] = set(re.findall(r"`(\w+)`", cell))
    assert listed == imports_between_packages(service, inside)


def test_every_service_has_its_page_and_the_map_names_them_all() -> None:
    text = ARCHITECTURE.read_text()
    for service in (p for p in (ROOT / "services").iterdir() if p.is_dir()):
        assert (service / "README.md").exists()
        assert f"| {service.name} |" in text
