"""A pytest plugin: with --strict-skips a skipped test fails, unless tests/allowed_skips.toml lists its reason."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Generator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest

LIST = Path(__file__).parents[1] / "allowed_skips.toml"


@cache
def allowed_skips() -> dict[str, str]:
    """Return why each skip is allowed, by a glob of its reason."""
    listed = tomllib.loads(LIST.read_text())["allowed"]
    return {entry["reason"]: entry["why"] for entry in listed}


def is_allowed(reason: str) -> bool:
    """Return whether the list has a skip with this reason."""
    return any(fnmatchcase(reason, glob) for glob in allowed_skips())


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --strict-skips."""
    parser.addoption(
        "--strict-skips", action="store_true", help=f"fail what is skipped, unless {LIST.name} lists why"
    )


def _skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str | None:
    """Return why a test was skipped; None if it was not, or is expected to fail."""
    if not report.skipped or hasattr(report, "wasxfail") or not isinstance(report.longrepr, tuple):
        return None
    return str(report.longrepr[2]).removeprefix("Skipped: ")


def _check_skip(report: pytest.TestReport | pytest.CollectReport, config: pytest.Config) -> None:
    reason = _skip_reason(report)
    if reason is not None and config.getoption("strict_skips") and not is_allowed(reason):
        report.outcome = "failed"
        report.longrepr = f"skipped, and not on the list ({LIST.name}): {reason}"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a test that is skipped for a reason of its own."""
    report = yield
    _check_skip(report, item.config)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Fail a module that is skipped for a reason of its own."""
    report = yield
    _check_skip(report, collector.config)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests were skipped, and why."""
    reasons = Counter(_skip_reason(report) or "" for report in terminalreporter.stats.get("skipped", []))
    terminalreporter.section("skips")
    terminalreporter.write_line(f"{reasons.total()} skipped")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} times: {'' if is_allowed(reason) else 'NOT ON THE LIST: '}{reason}")
