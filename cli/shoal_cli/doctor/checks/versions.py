"""Versions of every service of every node. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from shoal_cli.doctor.finding import Finding, Level, join_names
from shoal_common.liveness.compatibility import are_compatible

CHECK = "versions"


def check(versions: Mapping[tuple[str, str], str], own: str) -> list[Finding]:
    """Return which versions differ. `versions`: by node and service; `own`: of this command."""
    if not versions:
        return [Finding(CHECK, "ok", f"this command is {own}; no service is up")]
    # What most services are is what the others should be; of two, the later.
    counts = Counter(versions.values())
    usual = max(counts, key=lambda v: (counts[v], _sortable(v)))
    wrong = []
    for version in sorted(set(versions.values()) - {usual}, key=_sortable):
        nodes = sorted({node for (node, _), v in versions.items() if v == version})
        services = [f"{service} of {node}" for (node, service), v in sorted(versions.items()) if v == version]
        is_compatible = are_compatible(version, usual)
        level: Level = "warning" if is_compatible else "problem"
        effect = "they should be the same" if is_compatible else "they do not understand each other's messages"
        what = f"{join_names(services, 6)}: version {version}, the others {usual}; {effect}"
        remedy = f"install one version everywhere, then run `shoal down` and `shoal up` on {join_names(nodes)}"
        wrong.append(Finding(CHECK, level, what, remedy, f"nodes {', '.join(nodes)}"))
    if own != usual:
        level = "warning" if are_compatible(own, usual) else "problem"
        what = f"this command is version {own}, the services are {usual}"
        remedy = "use the `shoal` installed with the services, or restart an upgraded node: `shoal down`, `shoal up`"
        wrong.append(Finding(CHECK, level, what, remedy))
    return wrong or [Finding(CHECK, "ok", f"all {len(versions)} services and this command are {own}")]


def _sortable(version: str) -> list[tuple[int, str]]:
    return [(int(p) if p.isdigit() else -1, p) for p in version.split(".")]
