"""The code keeps the structure that docs/architecture.md draws and the words of docs/glossary.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from scripts.structure import (
    ALL,
    MAX_LINES,
    MAX_MODULES,
    bound_names,
    class_names_used_twice,
    line_counts,
    modules,
    modules_per_package,
    retired_names,
    retired_terms,
)

ROOT = Path(__file__).parents[2]
GLOSSARY = ROOT / "docs" / "glossary.md"
PAGES = sorted(
    {*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("services/*/README.md")}
)
# The inside of a stage is about to be replaced, and keeps its names until then.
STAGE = ROOT / "services" / "inference" / "shoal_inference" / "stage"
# One module per verb is what makes a command easy to find there.
MAX_TEST_NAME = 60
BY_VERB = "cli/shoal_cli/commands"


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_a_package_has_at_most_twelve_modules() -> None:
    counts = modules_per_package(ROOT)
    assert not {package: n for package, n in counts.items() if n > MAX_MODULES and package != BY_VERB}


def test_a_file_has_at_most_four_hundred_lines() -> None:
    assert not {path: n for path, n in line_counts(ROOT).items() if n > MAX_LINES}


def test_a_tests_name_has_at_most_sixty_characters() -> None:
    tests = [p for p in modules(ROOT, ("tests",)) if p.name.startswith("test_")]
    named = {name for path in tests for name, _ in bound_names(path) if name.startswith("test_")}
    assert not {name for name in named if len(name) > MAX_TEST_NAME}


def test_no_class_name_means_two_things() -> None:
    assert not class_names_used_twice(ROOT)


def test_one_module_alone_uses_the_bucket_of_outcomes() -> None:
    assert [p.name for p in modules(ROOT) if "buckets.done" in p.read_text()] == ["outcomes.py"]


def _at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what runs when a module is imported: everything but the bodies of functions."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _at_import(child)


def test_importing_a_module_makes_no_threads() -> None:
    names = {"ThreadPoolExecutor", "ProcessPoolExecutor", "Thread"}
    for path in modules(ROOT):
        for node in _at_import(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func).rpartition(".")[2] not in names, f"{short(path)}:{node.lineno}"


# These cut credentials out of a URL.
OF_URLS = {"range_reader.py", "connection.py", "node_plan.py"}


def test_only_names_takes_the_name_of_a_model_apart() -> None:
    by_hand = re.compile(r"""(partition|split)\(["']@|repo\}@\{\w*\.?commit""")
    found = {p.name for p in modules(ROOT) if by_hand.search(p.read_text())}
    assert found - OF_URLS == {"names.py"}


def test_a_pure_module_is_called_after_what_it_decides() -> None:
    assert not [p for p in modules(ROOT) if p.name == "decide.py"]


def test_modules_bind_no_names_with_a_retired_word() -> None:
    held = retired_terms(GLOSSARY, "identifiers"), retired_terms(GLOSSARY, "constants")
    sources = [p for p in modules(ROOT, ALL) if not p.is_relative_to(STAGE)]
    found = {short(p): retired_names(p, *held) for p in sources}
    assert not {path: names for path, names in found.items() if names}


def texts_of(source: Path) -> Iterator[tuple[str, int]]:
    """Docstrings, comments and string literals of a module, with their lines."""
    text = source.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value, node.lineno
    for number, line in enumerate(text.splitlines(), 1):
        if "# " in line:
            yield line.partition("# ")[2], number


RETIRED = {word.lower(): instead for word, instead in retired_terms(GLOSSARY, "text").items()}
ANY_RETIRED = re.compile(rf"\b(?:{'|'.join(map(re.escape, RETIRED))})\b", re.IGNORECASE)


def retired_in(text: str) -> list[str]:
    """Retired words in a text, with what to write instead."""
    return [f"not {word!r}, but {RETIRED[word.lower()]}" for word in ANY_RETIRED.findall(text)]


def test_docstrings_comments_and_messages_use_no_retired_word() -> None:
    found = [
        f"{short(source)}:{line} {held}"
        for source in modules(ROOT, ALL)
        for text, line in texts_of(source)
        for held in retired_in(text)
    ]
    assert not found, "\n".join(found)


def test_pages_use_no_retired_words() -> None:
    texts = {page: page.read_text() for page in PAGES}
    texts[GLOSSARY] = texts[GLOSSARY].partition("\n## Retired words")[0]
    assert not {short(page): found for page, text in texts.items() if (found := retired_in(text))}
