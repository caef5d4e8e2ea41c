"""A real service of another version: the tree's own code with another VERSION."""

from __future__ import annotations

import os
from pathlib import Path

from tests.harness.process import source_path


def runs_as(directory: Path, version: str) -> dict[str, str]:
    """Return what to add to a Python process's environment so that it takes itself for this version of Shoal.

    The product has no such setting: Python itself imports `sitecustomize` first.
    """
    at = directory / f"version-{version.replace('/', '_')}"
    if not at.exists():  # never change it while a running process may read it
        at.mkdir(parents=True)
        (at / "sitecustomize.py").write_text(f"import shoal_common\n\nshoal_common.VERSION = {version!r}\n")
    return {"PYTHONPATH": f"{at}{os.pathsep}{source_path()}"}
