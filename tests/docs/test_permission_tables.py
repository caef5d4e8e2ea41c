"""docs/permissions.md says what the NATS server is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_permissions_page_matches_the_table() -> None:
    command = [sys.executable, "-m", "scripts.permission_tables", "--check"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
