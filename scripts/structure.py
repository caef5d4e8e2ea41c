"""Figures of the code's structure: `python scripts/structure.py [--repo DIR]` prints one JSON object.

Counts modules per package, lines per file, class names with two meanings, files called decide.py, and names that use
a word which docs/glossary.md retires. `make lint` checks who imports whom (`.importlinter`).
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1]
SOURCES = ("libs", "services", "cli", "demo", "deploy", "scripts", "tools")
ALL = (*SOURCES, "bench", "examples", "tests")
MAX_LINES = 400
MAX_MODULES = 12
_HUMPS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def modules(repo: Path, tops: tuple[str, ...] = SOURCES) -> list[Path]:
    """Return the Python files below these directories of a repository."""
    return sorted(p for top in tops for p in (repo / top).rglob("*.py") if ".venv" not in p.parts)


def modules_per_package(repo: Path) -> dict[str, int]:
    """Return the number of modules of each package, `__init__` and `__main__` not counted."""
    paths = [p for p in modules(repo, ("libs", "services", "cli", "demo")) if p.stem not in ("__init__", "__main__")]
    return dict(Counter(str(p.parent.relative_to(repo)) for p in paths))


def line_counts(repo: Path) -> dict[str, int]:
    """Return the lines of each Python file, tests and benchmarks included."""
    return {str(p.relative_to(repo)): len(p.read_text().splitlines()) for p in modules(repo, ALL)}


def class_names_used_twice(repo: Path) -> dict[str, list[str]]:
    """Return the top-level class names that more than one module defines, with the modules."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in modules(repo, ("libs", "services", "cli", "demo")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                found[node.name].append(str(path.relative_to(repo)))
    return {name: places for name, places in found.items() if len(places) > 1}


@cache
def retired_terms(glossary: Path, held_in: str) -> dict[str, str]:
    """Return what the glossary retires in `identifiers`, `constants` or `text`, with what to write instead."""
    rows = re.findall(r"^\| (.+?) \| (.+?) \| ([a-z, ]+?) \|$", glossary.read_text(), re.MULTILINE)
    return {
        word: instead
        for listed, instead, where in rows
        if held_in in where.split(", ")
        for word in listed.removesuffix(" (constants)").split(", ")
    }


def bound_names(path: Path) -> Iterator[tuple[str, int]]:
    """Yield each name that a module binds, with its line; references to names of libraries do not count."""
    yield path.stem, 1
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name, node.lineno
            case ast.arg():
                yield node.arg, node.lineno
            case ast.Name(ctx=ast.Store()):
                yield node.id, node.lineno
            case ast.Attribute(ctx=ast.Store()):
                yield node.attr, node.lineno


def retired_names(path: Path, terms: dict[str, str], constants: dict[str, str]) -> list[str]:
    """Return a line for each name of a module that uses a retired word; names of tests are sentences."""
    found = []
    for name, line in bound_names(path):
        normal = f"_{_HUMPS.sub('_', name).lower().strip('_')}_"
        held = {} if name.startswith("test_") else terms | constants if name.isupper() else terms
        found += [
            f"{path}:{line} {name}: not {word}, but {instead}"
            for word, instead in held.items()
            if f"_{word.replace(' ', '_')}_" in normal
        ]
    return found


def figures(repo: Path, glossary: Path) -> dict[str, Any]:
    """Return all figures of a repository."""
    packages, lines, twice = modules_per_package(repo), line_counts(repo), class_names_used_twice(repo)
    terms, constants = retired_terms(glossary, "identifiers"), retired_terms(glossary, "constants")
    stage = repo / "services" / "inference" / "shoal_inference" / "stage"
    names = [
        name
        for path in modules(repo, ALL)
        if not path.is_relative_to(stage)
        for name in retired_names(path, terms, constants)
    ]
    return {
        "modules_per_package_most": max(packages.values()),
        "packages_over_12_modules": {p: n for p, n in packages.items() if n > MAX_MODULES},
        "lines_per_file_most": max(lines.values()),
        "files_over_400_lines": {p: n for p, n in lines.items() if n > MAX_LINES},
        "class_names_with_two_meanings": len(twice),
        "files_called_decide": sum(p.name == "decide.py" for p in modules(repo)),
        "names_with_retired_words": len(names),
    }


def main() -> None:
    """Print the figures of this repository, or of another checkout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repo", type=Path, default=HERE, help="another checkout to count")
    repo = parser.parse_args().repo
    print(json.dumps(figures(repo, HERE / "docs" / "glossary.md"), indent=1))


if __name__ == "__main__":
    main()
