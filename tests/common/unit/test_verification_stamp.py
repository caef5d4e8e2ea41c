"""The verification stamp in a file's mtime."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal_common.store.verification_stamp import clear_stamp, has_stamp, write_stamp

NAME = "ab" * 32


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)
@given(st.integers(0, 4 * 10**18), st.binary(max_size=9))
def test_a_stamp_is_valid_until_time_or_size_change(tmp_path: Path, at_ns: int, data: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    os.utime(path, ns=(at_ns, at_ns))
    assert write_stamp(NAME, path) and has_stamp(NAME, path.stat())
    shown_ns = path.stat().st_mtime_ns
    assert shown_ns // 10**9 == at_ns // 10**9
    assert not has_stamp("cd" * 32, path.stat()), "of another name it is no proof"
    path.write_bytes(data + b"more")
    os.utime(path, ns=(shown_ns, shown_ns))
    assert not has_stamp(NAME, path.stat()), "of another size neither"
    path.write_bytes(data)
    os.utime(path, ns=(shown_ns, shown_ns))
    assert has_stamp(NAME, path.stat())
    clear_stamp(NAME, path)
    assert not has_stamp(NAME, path.stat())
    before_ns = path.stat().st_mtime_ns
    clear_stamp(NAME, path)
    assert path.stat().st_mtime_ns == before_ns


def test_a_stamp_is_of_a_file_and_not_of_its_copy(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        path.write_bytes(b"same")
    assert write_stamp(NAME, one)
    os.utime(other, ns=(0, one.stat().st_mtime_ns))
    assert not has_stamp(NAME, other.stat())
    (tmp_path / "link").hardlink_to(one)
    assert has_stamp(NAME, (tmp_path / "link").stat())
