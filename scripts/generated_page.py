"""Pages of docs/ with generated parts, each between `<!-- <mark>:<name> -->` and `<!-- /<mark> -->`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path


def update(page: Path, mark: str, texts: Mapping[str, str], source: str) -> None:
    """Rewrite the parts of a page, by name; with `--check` exit if they differ from `source`, and write nothing."""
    old = new = page.read_text()
    for name, text in texts.items():
        start, end = f"<!-- {mark}:{name} -->\n", f"<!-- /{mark} -->"
        before, rest = new.split(start)
        new = f"{before}{start}\n{text}\n\n{end}{rest.partition(end)[2]}"
    if "--check" not in sys.argv[1:]:
        page.write_text(new)
    elif new != old:
        raise SystemExit(f"docs/{page.name} does not match {source}: run `make docs`")
