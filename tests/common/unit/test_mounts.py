"""A store on a network file system is refused: its locks do not hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal_common.errors import Unsupported
from shoal_common.store.mounts import NETWORK_FILE_SYSTEMS, Mount, check_locks_hold, file_system_of, mounts

MOUNTED = [
    Mount(Path("/"), "ext4"),
    Mount(Path("/mnt"), "xfs"),
    Mount(Path("/mnt/share"), "nfs4"),
    Mount(Path("/mnt/share"), "tmpfs"),
    Mount(Path("/mnt/models"), "nfs"),
]


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/home/a/store", "ext4"), ("/mnt/x", "xfs"), ("/mnt/share/x", "tmpfs"), ("/mnt/models/x", "nfs")],
)
def test_a_path_is_on_the_deepest_and_last_mount_above_it(path: str, kind: str) -> None:
    assert file_system_of(Path(path), MOUNTED) == kind


@pytest.mark.parametrize("kind", sorted(NETWORK_FILE_SYSTEMS))
def test_a_store_without_working_locks_is_refused_with_a_remedy(kind: str) -> None:
    with pytest.raises(Unsupported, match=rf"is on {kind}.*storage\.path"):
        check_locks_hold(Path("/srv/store"), [Mount(Path("/"), "ext4"), Mount(Path("/srv"), kind)])


def test_this_machines_own_disk_is_taken(tmp_path: Path) -> None:
    assert file_system_of(tmp_path, mounts())
    check_locks_hold(tmp_path, mounts())
