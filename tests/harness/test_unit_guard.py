"""No test below a directory `unit` starts a process, connects to NATS or loads MLX: it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.inner_pytest import inner_pytest
from tests.harness.process import ROOT, source_path

REFUSED = {
    "process": ("import subprocess, sys\nsubprocess.run([sys.executable, '--version'])", "starts a process"),
    "fork": ("import os\nos.fork() or os._exit(0)", "starts a process"),
    "caught": (
        "import asyncio, contextlib\nwith contextlib.suppress(Exception):\n"
        "    asyncio.run(asyncio.create_subprocess_exec('true'))",
        "starts a process",
    ),
    "nats": ("import asyncio, nats\nasyncio.run(nats.connect('nats://127.0.0.1:1'))", "connects to NATS"),
    "mlx": ("import mlx.core", "loads MLX"),
}


def function_with(body: str) -> str:
    """Return the source of a test with this body."""
    return "def test_it():\n" + "\n".join(f"    {line}" for line in body.splitlines()) + "\n"


@pytest.mark.parametrize("what", REFUSED)
def test_a_unit_test_that_breaks_the_rule_fails(tmp_path: Path, what: str) -> None:
    body, message = REFUSED[what]
    ran = inner_pytest(tmp_path, {"unit/test_it.py": function_with(body)}, "-p", "tests.harness.unit_guard")
    assert ran.returncode == 1 and message in ran.stdout, ran.stdout


def test_outside_unit_a_test_may_start_processes(tmp_path: Path) -> None:
    files = {"service/test_it.py": function_with(REFUSED["process"][0])}
    ran = inner_pytest(tmp_path, files, "-p", "tests.harness.unit_guard")
    assert ran.returncode == 0, ran.stdout


def test_a_fixture_of_a_unit_test_may_start_no_process(tmp_path: Path) -> None:
    fixture = (
        "import pytest, subprocess\n@pytest.fixture(scope='session')\ndef made():\n    subprocess.run(['true'])\n"
    )
    files = {"unit/test_it.py": fixture + "def test_it(made):\n    pass\n"}
    ran = inner_pytest(tmp_path, files, "-p", "tests.harness.unit_guard")
    assert ran.returncode == 1 and "starts a process" in ran.stdout, ran.stdout


def test_no_module_of_unit_tests_loads_mlx() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *map(str, sorted(ROOT.glob("tests/*/unit")))],
        cwd=ROOT,
        env={"PATH": os.environ.get("PATH", ""), "PYTHONPATH": source_path()},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
