"""With --strict-skips a skip that is not on the list is a failure."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.inner_pytest import inner_pytest
from tests.harness.strict_skips import allowed_skips, is_allowed

PLUGIN = ("-p", "tests.harness.strict_skips")
SKIPS = {
    "by a call": "import pytest\ndef test_it():\n    pytest.skip({reason!r})\n",
    "by a mark": "import pytest\n@pytest.mark.skipif(True, reason={reason!r})\ndef test_it():\n    pass\n",
    "by a fixture": (
        "import pytest\n@pytest.fixture\ndef it():\n    pytest.skip({reason!r})\ndef test_it(it):\n    pass\n"
    ),
    "by its module": "import pytest\npytest.skip({reason!r}, allow_module_level=True)\n",
}
LISTED, OTHER = "no user namespaces on this machine: no test", "no strace on this machine"


@pytest.mark.parametrize("how", SKIPS)
def test_a_skip_fails_unless_its_reason_is_listed(tmp_path: Path, how: str) -> None:
    files = {f"test_{name}.py": SKIPS[how].format(reason=reason) for name, reason in (("a", LISTED), ("b", OTHER))}
    ran = inner_pytest(tmp_path, files, *PLUGIN, "--strict-skips")
    assert ran.returncode != 0 and f"not on the list (allowed_skips.toml): {OTHER}" in ran.stdout, ran.stdout
    assert f"1 skipped\n1 times: {LISTED}" in ran.stdout, ran.stdout


def test_elsewhere_a_skip_is_counted_and_said(tmp_path: Path) -> None:
    ran = inner_pytest(tmp_path, {"test_it.py": SKIPS["by a call"].format(reason=OTHER)}, *PLUGIN)
    assert ran.returncode == 0 and f"1 times: NOT ON THE LIST: {OTHER}" in ran.stdout, ran.stdout


def test_an_expected_failure_is_no_skip(tmp_path: Path) -> None:
    failing = "import pytest\n@pytest.mark.xfail(reason='known')\ndef test_it():\n    assert False\n"
    assert inner_pytest(tmp_path, {"test_it.py": failing}, *PLUGIN, "--strict-skips").returncode == 0


def test_every_entry_says_why_and_covers_no_other_skip() -> None:
    assert all(len(text) > 10 for text in allowed_skips().values())
    assert not is_allowed(OTHER) and not is_allowed("") and not is_allowed("not today")
