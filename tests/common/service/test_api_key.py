"""The key of a node: who makes it, who may read it, and what a damaged file does."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shoal_common import redaction
from shoal_common.errors import BadInput
from shoal_common.identity.api_key import (
    ApiKeyFile,
    api_key_path,
    ensure_api_key,
    read_api_key,
    replace_api_key,
)


def test_I12_a_key_is_private_and_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_secrets", {})
    assert read_api_key(tmp_path / "home") == ""
    key = ensure_api_key(tmp_path / "home")
    assert key.startswith("shoal-") and len(key) == 49
    assert stat.S_IMODE(api_key_path(tmp_path / "home").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "home").stat().st_mode) == 0o700
    assert ensure_api_key(tmp_path / "home") == read_api_key(tmp_path / "home") == key
    assert key not in redaction.redact(f"it is {key}")


def test_all_who_need_a_key_at_once_get_the_same(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        keys = list(threads.map(lambda _: ensure_api_key(tmp_path), range(16)))
    assert set(keys) == {read_api_key(tmp_path)}
    assert [f.name for f in tmp_path.iterdir()] == ["api.key"]


@pytest.mark.parametrize("text", ["", "\n", "shoal-short", f"shoal-{'k' * 42}!", "a directory"])
def test_a_damaged_key_is_refused_by_name_and_not_repeated(tmp_path: Path, text: str) -> None:
    path = api_key_path(tmp_path)
    path.mkdir() if text == "a directory" else path.write_text(text)
    for use in (read_api_key, ensure_api_key, ApiKeyFile):
        with pytest.raises(BadInput, match=r"api\.key") as error:
            use(tmp_path)
        assert len(text) < 6 or text == "a directory" or text not in error.value.message


def test_a_new_key_is_in_force_and_the_old_one_no_more(tmp_path: Path) -> None:
    file = ApiKeyFile(tmp_path)
    old = file.key
    file.refresh()
    assert file.is_key(old)
    new = replace_api_key(tmp_path)
    file.refresh()
    assert file.is_key(new) and not file.is_key(old)
    api_key_path(tmp_path).unlink()
    file.refresh()
    assert file.key == read_api_key(tmp_path) and not file.is_key(new)


def test_I12_while_the_file_is_damaged_nothing_is_the_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = ApiKeyFile(tmp_path)
    old = api_key_path(tmp_path).read_text()
    api_key_path(tmp_path).write_text("")
    for _ in range(3):
        file.refresh()
    assert not any(file.is_key(text) for text in ("", old, old.strip()))
    api_key_path(tmp_path).write_text(old)
    file.refresh()
    assert file.is_key(old.strip())
