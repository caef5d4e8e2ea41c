"""docs/protocol.md has the fields of every message, as the structs state them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "protocol.md"


def test_the_field_tables_match_the_messages() -> None:
    command = [sys.executable, "-m", "scripts.protocol_fields", "--check"]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_buckets_table_has_every_key_that_a_struct_names() -> None:
    page = PAGE.read_text()
    section = page.split("\n## Buckets\n")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", section, re.MULTILINE)
    stated = re.findall(r"`(\w+)` key `([^`]+)`, published by", page.split("\n## Fields\n")[1])
    assert sorted(listed) == sorted(stated)


def test_every_link_to_a_field_table_leads_to_one() -> None:
    page = PAGE.read_text()
    headings = {name.lower() for name in re.findall(r"^#### (\w+)$", page, re.MULTILINE)}
    linked = {anchor for name, anchor in re.findall(r"\[(\w+)\]\(#(\w+)\)", page) if name.lower() == anchor} - {
        "fields"
    }
    assert linked <= headings and "manifest" in linked
