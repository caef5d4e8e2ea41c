"""Only a node's user may read its home: from the first file on, and again after an older version left it open."""

from __future__ import annotations

import stat
from pathlib import Path

from shoal_common.config import ensure_node_id
from shoal_common.host.private_files import make_home
from shoal_common.settings_file import change_settings
from tests.harness.modes import open_to_others, usual_umask


def test_a_new_home_is_private_from_its_first_file_on(tmp_path: Path) -> None:
    with usual_umask():
        ensure_node_id(tmp_path / "home")
        change_settings(tmp_path / "other", {"storage": {"headroom_bytes": 5}}, lambda _: None)
    assert open_to_others(tmp_path / "home") == open_to_others(tmp_path / "other") == []


def test_a_change_of_settings_makes_the_file_private(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(0o755)
    (home / "node.toml").write_text('id = "a"\n')
    (home / "node.toml").chmod(0o644)
    (home / "node.toml.new").write_text("of a killed process")
    (home / "node.toml.new").chmod(0o644)
    change_settings(home, {"storage": {"headroom_bytes": 5}}, lambda _: None)
    assert open_to_others(home) == []


def test_an_open_home_becomes_private_and_libraries_stay(tmp_path: Path) -> None:
    home, library = tmp_path / "home", tmp_path / "library"
    with usual_umask():
        for directory in (home / "log", home / "run", home / "nats", home / "store", library):
            directory.mkdir(parents=True)
        for name in ("node.toml", "api.key", "chat_history", "log/storage.log", "log/storage.log.1", "run/lock"):
            (home / name).write_text("x")
    (home / "models").symlink_to(library)
    make_home(home)
    assert open_to_others(home) == ["0644 run/lock"], "its directory guards it"
    assert stat.S_IMODE(library.stat().st_mode) == 0o755
