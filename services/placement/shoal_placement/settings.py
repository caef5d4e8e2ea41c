"""The settings of placement. Each node has its own; those of the leader apply."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from shoal_common.durations import parse_duration_s
from shoal_common.errors import BadInput


class PlacementSettings(msgspec.Struct, frozen=True):
    """`[placement]` of node.toml, or SHOAL_RETIRE_AFTER and the like: durations such as `36h`, held in seconds."""

    retire_after_s: float = 86400.0
    """How long a node may be down before every key that names it is removed."""
    replace_after_s: float = 60.0
    """How long a node may be down before its instances move to other nodes."""


def read_settings(settings: Mapping[str, object], environ: Mapping[str, str]) -> PlacementSettings:
    """Read the settings; the environment wins. Raises BadInput for what is not a duration, and for 0."""
    values = {}
    for field in PlacementSettings.__struct_fields__:
        name = field.removesuffix("_s")
        value = environ.get(f"SHOAL_{name.upper()}") or settings.get(name)
        if value is None:
            continue
        try:
            values[field] = float(parse_duration_s(str(value)))
        except BadInput as e:
            raise BadInput(f"{name}: {e.message}") from None
        if values[field] == 0:
            raise BadInput(f"{name}: 0 would act on a node that is down for a moment; give a duration like 36h")
    return PlacementSettings(**values)
