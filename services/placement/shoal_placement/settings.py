"""The settings of placement. Each node has its own; those of the leader apply."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import field

from shoal_common.settings.declaration import Duration, Section, setting


class PlacementSettings(Section, frozen=True):
    """How long a node is waited for. No shorter than a second: 0 would act on a node that is down for a moment."""

    section: ClassVar[str] = "placement"

    retire_after_s: Annotated[
        Duration,
        setting("how long a node may be down before every key that names it is removed", example="36h"),
    ] = field(default=86400.0, name="retire_after")
    replace_after_s: Annotated[
        Duration,
        setting("how long a node may be down before its instances move to other nodes", example="5min"),
    ] = field(default=60.0, name="replace_after")
