"""docs/settings.md has every declared setting."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from scripts.settings_tables import SECTIONS
from shoal_common.settings.declaration import Section, settings_of

ROOT = Path(__file__).parents[2]


def test_the_settings_tables_match_the_declarations() -> None:
    command = [sys.executable, "-m", "scripts.settings_tables", "--check"]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_no_section_is_left_out_of_the_tables() -> None:
    def below(kind: type[Section]) -> list[type[Section]]:
        return [kind, *(sub for subclass in kind.__subclasses__() for sub in below(subclass))]

    shown = {kind for section in SECTIONS for kind in section.__mro__}
    own = [kind for kind in below(Section) if kind.__module__.endswith((".settings", ".settings.node"))]
    assert [kind.__name__ for kind in own if kind not in shown] == []


def test_no_source_spells_a_variable_that_a_declaration_implies() -> None:
    sources = [p.read_text() for top in ("libs", "services", "cli") for p in (ROOT / top).rglob("*.py")]
    # The supervisor passes these to every service, whatever node.toml says; redaction knows URLs by their variable.
    passed_on = ("bind", "nats", "gateway_port")
    declared = [s for kind in SECTIONS for s in settings_of(kind) if s.variable and s.key not in passed_on]
    spelt = {s.variable for s in declared if any(f'"{s.variable}"' in source for source in sources)}
    assert declared and not spelt
