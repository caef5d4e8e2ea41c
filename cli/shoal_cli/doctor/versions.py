"""Versions of every service of every node. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from shoal_cli.doctor.finding import Finding, Level, listed
from shoal_common.versions import work_together

CHECK = "versions"


def judge(versions: Mapping[tuple[str, str], str], here: str) -> list[Finding]:
    """What differs. `versions`: by node and service, as `live` has them; `here`: of this command."""
    if not versions:
        return [Finding(CHECK, "ok", f"this command is {here}; no service is live")]
    # What most of them are is what the others should be; of two, the later.
    counts = Counter(versions.values())
    usual = max(counts, key=lambda v: (counts[v], _sortable(v)))
    found = []
    for version in sorted(set(versions.values()) - {usual}, key=_sortable):
        who = sorted({node for (node, _), v in versions.items() if v == version})
        what = [f"{service} of {node}" for (node, service), v in sorted(versions.items()) if v == version]
        other_major = not work_together(version, usual)
        level: Level = "problem" if other_major else "warning"
        because = "they do not understand each other's messages" if other_major else "they should be the same"
        words = f"{listed(what, 6)}: version {version}, where the others are {usual}; {because}"
        remedy = f"install one version everywhere, then `shoal down` and `shoal up` on {listed(who)}"
        found.append(Finding(CHECK, level, words, remedy, f"nodes {', '.join(who)}"))
    if here != usual:
        level = "warning" if work_together(here, usual) else "problem"
        words = f"this command is version {here}, the services are {usual}"
        remedy = (
            "call the `shoal` beside the services, or restart the node if it was upgraded: `shoal down`, `shoal up`"
        )
        found.append(Finding(CHECK, level, words, remedy))
    return found or [Finding(CHECK, "ok", f"all {len(versions)} services and this command are {here}")]


def _sortable(version: str) -> list[tuple[int, str]]:
    return [(int(p) if p.isdigit() else -1, p) for p in version.split(".")]
