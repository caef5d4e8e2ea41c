"""What a person reads whom the system refuses a file."""

from __future__ import annotations

import getpass
from pathlib import Path

from shoal_cli.errors import permission_denied_message


def test_permission_denied_names_the_files_owner_and_a_remedy(tmp_path: Path) -> None:
    root = Path("/etc/passwd").owner()
    theirs = permission_denied_message(PermissionError(13, "Permission denied", "/etc/shoal-of-nobody/run/lock"))
    assert theirs.startswith(f"/etc/shoal-of-nobody/run/lock, which belongs to {root}: Permission denied; ")
    assert (f"run this as {root}" in theirs) == (getpass.getuser() != root)
    ours = permission_denied_message(PermissionError(1, "Operation not permitted", str(tmp_path / "x")))
    assert f"which belongs to {tmp_path.owner()}" in ours and "run this as" not in ours and "--home" in ours
