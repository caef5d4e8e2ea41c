"""Which versions of Shoal are compatible: those of the same major version. Pure.

Versions are semantic (`1.4.2`, `2.0.0-rc.1+build`). While major is 0, the minor counts as major: 0.3.1 and 0.3.9 are
compatible, 0.3 and 0.4 are not. A text that is not a version is compatible with none, not even itself.
"""

from __future__ import annotations

import re

_NUMBER = r"(0|[1-9][0-9]{0,8})"
_SUFFIX = r"[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*"
_VERSION = re.compile(rf"{_NUMBER}\.{_NUMBER}\.{_NUMBER}(?:-{_SUFFIX})?(?:\+{_SUFFIX})?")
_MAX_CHARACTERS = 128


def major(version: str) -> str | None:
    """Return what compatible versions have in common: `2`, or `0.3`. None if this is not a version."""
    match = _VERSION.fullmatch(version) if len(version) <= _MAX_CHARACTERS else None
    if match is None:
        return None
    first, second = match.group(1), match.group(2)
    return f"0.{second}" if first == "0" else first


def work_together(one: str, other: str) -> bool:
    """Return whether services of these versions may talk to each other."""
    first_version = major(one)
    return first_version is not None and first_version == major(other)
