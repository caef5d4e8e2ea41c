"""Build hook of hatchling: a distribution requires the others of this repository in its own version.

The version is `VERSION` in `shoal_common/__init__.py`, which each pyproject.toml reads by its path. So wheels are
built from the repository, never from a source distribution.
"""

from __future__ import annotations

from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class SameVersion(MetadataHookInterface):
    """Sets `dependencies` from `[tool.hatch.metadata.hooks.custom]`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the dependencies to a distribution's metadata, which has its version already."""
        metadata["dependencies"] = [pinned(name, metadata["version"]) for name in self.config["dependencies"]]


def pinned(requirement: str, version: str) -> str:
    """Return the requirement, of exactly this version if it is a distribution of this repository."""
    return f"{requirement}=={version}" if requirement.startswith("shoal-") else requirement
