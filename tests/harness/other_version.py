"""A real service of another version: the tree's own code, whose VERSION is another before anything reads it."""

from __future__ import annotations

import os
from pathlib import Path

from tests.harness.process import source_path


def runs_as(directory: Path, version: str) -> dict[str, str]:
    """What to add to the environment of a Python process so that it takes itself for this version of Shoal.

    The product knows no such setting: Python itself imports `sitecustomize` before anything else.
    """
    at = directory / f"version-{version.replace('/', '_')}"
    if not at.exists():  # never while a process that was started before may read it
        at.mkdir(parents=True)
        (at / "sitecustomize.py").write_text(f"import shoal_common\n\nshoal_common.VERSION = {version!r}\n")
    return {"PYTHONPATH": f"{at}{os.pathsep}{source_path()}"}
