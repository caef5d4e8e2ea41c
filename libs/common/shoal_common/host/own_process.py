"""What each process of a node sets for itself before anything else."""

from __future__ import annotations

import os

from shoal_common.host.private_files import PRIVATE_UMASK


def set_up_process() -> None:
    """Keep what this process and its children write from other users."""
    os.umask(PRIVATE_UMASK)
