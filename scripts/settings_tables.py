"""Render every declared setting into docs/settings.md, between `<!-- settings:… -->` and `<!-- /settings -->`.

`--check` fails if the page is stale.
"""

from __future__ import annotations

from pathlib import Path

from scripts.generated_page import update
from shoal_common.settings.declaration import Section, Setting, settings_of
from shoal_common.settings.node import FileserverSettings, InferenceSettings, NodeSettings, StorageSettings
from shoal_gateway.settings import GatewayTimeouts
from shoal_placement.settings import PlacementSettings

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
SECTIONS: tuple[type[Section], ...] = (
    StorageSettings,
    FileserverSettings,
    InferenceSettings,
    PlacementSettings,
    GatewayTimeouts,
    NodeSettings,
)


def all_settings() -> dict[str, list[Setting]]:
    """Return the settings by section."""
    sections: dict[str, list[Setting]] = {}
    for setting in (s for kind in SECTIONS for s in settings_of(kind)):
        sections.setdefault(setting.section, []).append(setting)
    return sections


def default_text(setting: Setting) -> str:
    """Return what holds while a setting has no value of its own."""
    if setting.usage.unset:
        return setting.usage.unset
    if setting.is_list:
        return "none"
    if setting.is_text and setting.unit:
        return setting.unit.format(setting.default)
    if isinstance(setting.default, bool):
        return f"`{str(setting.default).lower()}`"
    number = f"{setting.default:g}" if isinstance(setting.default, float) else f"{setting.default}"
    return f"`{number}`, {setting.unit.format(setting.default)}" if setting.unit else f"`{number}`"


def render(settings: list[Setting]) -> str:
    """Return the table of a section."""
    lines = ["| key | environment | value | default | meaning | flags |", "| --- | --- | --- | --- | --- | --- |"]
    for s in settings:
        flags = [f"`{flag.name}`" for flag in (s.usage.flag, s.usage.remove_flag) if flag]
        cells = (
            f"`{s.key}`",
            f"`{s.variable}`" if s.variable else "",
            s.expected + (f", like `{s.example}`" if s.example else ""),
            default_text(s),
            s.description,
            ", ".join(flags) if flags else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Rewrite the page, or with `--check` only compare it."""
    tables = {section: render(settings) for section, settings in all_settings().items()}
    update(PAGE, "settings", tables, "the declared settings")


if __name__ == "__main__":
    main()
