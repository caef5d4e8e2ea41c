"""Finds out which names a file system takes for one. Blocking."""

from __future__ import annotations

import unicodedata
from contextlib import suppress
from pathlib import Path

from shoal_storage.admission.name_folding import NameFolding

_PROBE = ".Caf\u00e9.new"
"""Composed. A start deletes what is left of a killed one, as of every `.<name>.new`."""


def read_folding(directory: Path) -> NameFolding:
    """Return what a directory's file system ignores, by making a file and looking for it. Blocking.

    On a full disk that may fail: then names count as folded in both ways, so that no file is lost.
    """
    probe = directory / _PROBE
    try:
        probe.touch()
        return NameFolding(
            case=probe.with_name(_PROBE.upper()).exists(),
            forms=probe.with_name(unicodedata.normalize("NFD", _PROBE)).exists(),
        )
    except OSError:
        return NameFolding(case=True, forms=True)
    finally:
        with suppress(OSError):
            probe.unlink()
