"""The demo, as `make demo` runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys


def test_the_demo_ends_with_a_summary_and_a_readable_answer() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "shoal_demo"],
        env={**os.environ, "DEMO_EXIT": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["nodes"] == 3
    assert summary["stages"] == 2
    assert summary["hub_bytes"] <= 1.02 * summary["model_bytes"]
    # The last leaves may be requested from two nodes at once, and so small a model has no others.
    assert 2 * summary["model_bytes"] <= summary["peer_bytes"] <= 4 * summary["model_bytes"]
    assert summary["answer"].startswith("Fish swim together because")
    assert summary["answer"].rstrip().endswith(".")
