"""Run pytest over files of a test, in a process of its own, with plugins of this tree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.harness.process import source_path

DEADLINE_S = 120.0


def inner_pytest(directory: Path, files: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Write these files and run pytest over them. Returns what it printed and its exit code."""
    for name, content in {"pytest.ini": "[pytest]\n", **files}.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", *arguments],
        cwd=directory,
        env={"PATH": os.environ.get("PATH", ""), "PYTHONPATH": source_path()},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
