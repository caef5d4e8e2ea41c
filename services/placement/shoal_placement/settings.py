"""The settings of placement. They hold where it leads; each node that may lead has its own."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from shoal_common.errors import BadInput
from shoal_common.spans import parse_seconds


class Settings(msgspec.Struct, frozen=True):
    """`[placement]` of node.toml, or SHOAL_RETIRE_AFTER and the like: spans such as `36h`. Seconds."""

    retire_after_s: float = 86400.0
    """Silence after which what names a node is removed."""
    replace_after_s: float = 60.0
    """For how long a node may be away before the instances that it runs move to others."""


def read_settings(settings: Mapping[str, object], environ: Mapping[str, str]) -> Settings:
    """Raises BadInput for what is no span of time, and for none."""
    found = {}
    for field in Settings.__struct_fields__:
        name = field.removesuffix("_s")
        value = environ.get(f"SHOAL_{name.upper()}") or settings.get(name)
        if value is None:
            continue
        try:
            found[field] = float(parse_seconds(str(value)))
        except BadInput as e:
            raise BadInput(f"{name}: {e.message}") from None
        if found[field] == 0:
            raise BadInput(f"{name}: 0 would act on a node that is silent for a moment; give a span like 36h")
    return Settings(**found)
