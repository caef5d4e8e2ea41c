"""Forked services and lives behave as processes that begin with an interpreter."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.harness.forked import ForkedService, fork
from tests.harness.process import ROOT, can_be_forked, node_environment, started

DEADLINE_S = 45


def test_a_service_that_cannot_start_returns_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_NATS", "nats://127.0.0.1:1")  # of the test: a service does not see it
    (tmp_path / "node.toml").write_text("id = [")
    with (tmp_path / "log").open("wb") as output:
        service = ForkedService("storage", {"SHOAL_HOME": str(tmp_path)}, output.fileno())
    assert service.wait(DEADLINE_S) == service.returncode == 2
    assert (tmp_path / "log").read_text().startswith("shoal storage: ")


async def test_a_forked_service_ends_by_a_signal_with_its_lines_read(tmp_path: Path, closed_port: int) -> None:
    environment = node_environment(tmp_path, f"nats://127.0.0.1:{closed_port}")
    async with started("-m", "shoal_fileserver", environment=environment) as process:
        await process.wait_line('msg="waiting for NATS"')
        assert process.running
        process.send(signal.SIGTERM)
        assert await process.wait_exit() == 0
        assert "msg=stopped" in process.lines[-1]


def test_a_service_with_variables_python_reads_is_not_forked(tmp_path: Path) -> None:
    usual = node_environment(tmp_path, "nats://127.0.0.1:1", HF_ENDPOINT="http://hub", SHOAL_BIND="127.0.0.1")
    assert can_be_forked(usual)
    assert not can_be_forked({**usual, "PYTHONPATH": f"{tmp_path}:{usual['PYTHONPATH']}"})
    assert not can_be_forked({**usual, "OPENBLAS_NUM_THREADS": "1"})


def test_a_forked_process_has_the_code_of_this_tree(tmp_path: Path) -> None:
    written = tmp_path / "files"
    modules = ("shoal_common", "shoal_storage", "shoal_gateway")
    files = " ".join(f"{{{module}.__file__}}" for module in modules)
    code = f"import {', '.join(modules)}\nopen({str(written)!r}, 'w').write(f'{files}')"
    process = fork(exec, code)
    process.join(DEADLINE_S)
    assert process.exitcode == 0
    assert [Path(file).is_relative_to(ROOT) for file in written.read_text().split()] == [True] * 3
