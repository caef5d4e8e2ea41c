"""Which versions of Shoal work together: those of the same major version. Pure.

Versions are semantic (`1.4.2`, `2.0.0-rc.1+build`). While major is 0 the minor counts as major: 0.3.1 and 0.3.9 work
together, 0.3 and 0.4 do not. What is no version is another major than every one, itself included.
"""

from __future__ import annotations

import re

_NUMBER = r"(0|[1-9][0-9]{0,8})"
_WORDS = r"[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*"
_VERSION = re.compile(rf"{_NUMBER}\.{_NUMBER}\.{_NUMBER}(?:-{_WORDS})?(?:\+{_WORDS})?")
_LONGEST = 128


def major(version: str) -> str | None:
    """What has to be equal for two versions to work together: `2`, or `0.3`. None for what is no version."""
    match = _VERSION.fullmatch(version) if len(version) <= _LONGEST else None
    if match is None:
        return None
    first, second = match.group(1), match.group(2)
    return f"0.{second}" if first == "0" else first


def work_together(one: str, other: str) -> bool:
    """Whether services of these versions may talk to each other."""
    ours = major(one)
    return ours is not None and ours == major(other)
