"""Status, models and instances for people."""

from __future__ import annotations

import time

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shoal_cli.client.answers import DiskRow, InstanceRow, ModelRow, NodeRow, StatusAnswer
from shoal_cli.client.progress import line
from shoal_cli.sizes import show_bytes, show_seconds
from shoal_common.messages.questions import Fits, Previews, Rebalances
from shoal_common.messages.records import ENDED, PartState, StorageState

_PHASE_STYLES = {"ready": "green", "starting": "yellow", "degraded": "yellow", "failed": "red"}

_SHOWN = 40
_LINKS = {"thunderbolt": "Thunderbolt", "ethernet": "Ethernet", "wifi": "Wi-Fi", "virtual": "a tunnel"}
"""How this node reaches another; nothing is said of one on the same machine."""


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for name in columns:
        right = name in ("size", "used", "free", "memory", "headroom")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    return table


def status_page(status: StatusAnswer) -> RenderableType:
    """Everything `shoal status` shows."""
    parts: list[RenderableType] = [nodes_table(status)]
    parts += [Text(words) for n in status.nodes if n.storage for words in strange_words(n.node, n.storage)]
    if not status.nats_connected:
        parts.insert(0, Text("this gateway has lost NATS: what follows may be old", style="red"))
    under_way = [d for d in status.downloads if d.phase not in ENDED]
    if under_way:
        parts += [Text("\ndownloads", style="bold"), *(Text(f"{d.model}  {line(d, {})}") for d in under_way)]
    if status.models:
        parts += [Text("\nmodels", style="bold"), models_table(status.models)]
    parts += [Text(f"{part.node} has {part_words(part)}") for part in status.parts]
    if status.instances:
        parts += [Text("\ninstances", style="bold"), instances_table(status.instances)]
    return Group(*parts)


def nodes_table(status: StatusAnswer) -> RenderableType:
    """The nodes, their memory and disks."""
    table = _table("node", "state", "memory", "used", "free", "quota, policy")
    for n in status.nodes:
        name = Text(n.node, style="bold" if n.node == status.node else "")
        s = n.storage
        table.add_row(
            name,
            _node_state(n, status.version),
            f"{show_bytes(n.memory_available_bytes)} of {show_bytes(n.memory_total_bytes)}"
            if n.memory_total_bytes
            else "-",
            _used(s) if s else "-",
            show_bytes(s.free_bytes) if s else "-",
            f"{_quota(s)}, {s.eviction_policy}" if s else "-",
        )
    return table


def _used(storage: StorageState) -> str:
    if not storage.quota_bytes:
        return show_bytes(storage.used_bytes)
    return f"{show_bytes(storage.used_bytes)} ({100 * storage.used_bytes / storage.quota_bytes:.0f} %)"


def _quota(storage: StorageState) -> str:
    return "none" if storage.quota_bytes is None else show_bytes(storage.quota_bytes)


def disks_table(disks: list[DiskRow]) -> RenderableType:
    """The disks and their settings."""
    table = _table("node", "used", "free", "quota", "policy", "headroom", "models")
    for row in disks:
        s = row.storage
        free = row.disk_free_bytes if row.disk_free_bytes is not None else s.free_bytes if s else None
        table.add_row(
            Text(row.node if row.live else f"{row.node} (away)", style="" if row.live else "red"),
            _used(s) if s else "-",
            "-" if free is None else show_bytes(free),
            _quota(s) if s else "-",
            s.eviction_policy if s else "-",
            show_bytes(s.headroom_bytes) if s else "-",
            str(s.model_count) if s else "-",
        )
    return table


def strange_words(node: str, storage: StorageState) -> list[str]:
    """What a person may want to know of files that storage did not put there, and of a store that has gone."""
    words = []
    if storage.store_away:
        words.append(f"{node}: the store has gone: mount its disk, or put it back")
    if storage.unproven_count:
        copied = "1 copied-in file" if storage.unproven_count == 1 else f"{storage.unproven_count} copied-in files"
        words.append(f"{node}: {copied}, {show_bytes(storage.unproven_bytes)}, to be hashed before use")
    if storage.unknown_count:
        unknown = "1 unknown file" if storage.unknown_count == 1 else f"{storage.unknown_count} unknown files"
        first = ", ".join(storage.unknown) + (", …" if storage.unknown_count > len(storage.unknown) else "")
        words.append(f"{node}: {unknown}, {show_bytes(storage.unknown_bytes)}, never deleted: {first}")
    return words


def part_words(part: PartState) -> str:
    """A part for a person: `layers 0-13 of org/name (73e3c0a1): 1.2 GB of 2.4 GB`."""
    runs = ", ".join(f"{first}-{last - 1}" for first, last in part.layers)
    sizes = f"{show_bytes(part.size_bytes)} of {show_bytes(part.model_bytes)}"
    return f"layers {runs} of {part.repo} ({part.commit[:8]}): {sizes}"


def _node_state(node: NodeRow, version_here: str) -> Text:
    if node.other_versions:
        versions = ", ".join(sorted({version[:_SHOWN] for version in node.other_versions.values()}))
        return Text(f"ignored: runs Shoal {versions}, this is {version_here}", style="red")
    if not node.live:
        since_s = node.silent_since_s
        return Text("away" if since_s is None else f"away for {show_seconds(time.time() - since_s)}", style="red")
    if node.missing_services:
        return Text(f"without {', '.join(node.missing_services)}", style="yellow")
    uptime_s = min((s.uptime_s for s in node.services.values()), default=0.0)
    by = f", by {_LINKS[node.link]}" if node.link in _LINKS else ""
    if node.drained:
        return Text(f"drained, up {show_seconds(uptime_s)}{by}", style="yellow")
    return Text(f"up {show_seconds(uptime_s)}{by}", style="green")


def models_table(models: list[ModelRow]) -> RenderableType:
    """The models and who holds them."""
    table = _table("model", "commit", "size", "nodes")
    for m in models:
        table.add_row(m.repo, m.commit[:8], show_bytes(m.size_bytes), ", ".join(m.nodes))
    # Whole and unbroken, below: a path in a narrow column is of no use to anybody.
    places = [f"{m.repo} on {n} is in {m.adopted_from[n]}" for m in models for n in m.nodes if n in m.adopted_from]
    return Group(table, *(Text(place, style="dim", no_wrap=True, overflow="ignore") for place in places))


def instances_table(instances: list[InstanceRow]) -> RenderableType:
    """The instances and their stages."""
    table = _table("instance", "model", "state", "stages")
    for i in instances:
        stages = ", ".join(
            f"{s.node}[{s.first_layer}-{s.last_layer - 1}]"
            if s.first_layer is not None and s.last_layer is not None
            else s.node
            for s in i.stages
        )
        table.add_row(i.id, i.repo, how_it_stands(i), stages or ", ".join(i.nodes))
    return table


_TIER_STYLES = {"fits": "green", "tight": "yellow", "force": "red"}


def previews_table(answer: Previews) -> RenderableType:
    """Layouts that could be chosen, the best first."""
    table = _table("layout", "memory", "tokens/s", "first token", "to download", "each node needs, of what is free")
    table.columns[0].no_wrap = True  # it is there to be copied
    for p in answer.previews:
        each = ", ".join(
            f"{s.node} {show_bytes(s.needed_bytes)} of {show_bytes(s.available_bytes)}"
            + (f" (free {show_bytes(s.freeing_bytes)} more)" if s.freeing_bytes else "")
            for s in p.stages
        )
        style = _TIER_STYLES[p.tier]
        table.add_row(
            p.layout,
            Text(p.tier, style=style),
            _speed(p.tokens_per_s),
            f"{p.first_token_s * 1000:.3g} ms",
            show_bytes(p.fetch_bytes) if p.fetch_bytes else "-",
            each,
        )
    words = [f"for {answer.model} with {answer.context_tokens} tokens of context; times are predictions"]
    if answer.estimated:
        words.append("its architecture is not known: what it needs is an upper bound")
    if any(s.link_s and not s.link_measured for p in answer.previews for s in p.stages):
        words.append("not all links between these nodes are measured yet: in a moment more is known")
    if answer.previews[0].is_low_memory:
        flag = "--allow-low-memory" if answer.previews[0].tier == "tight" else "--force"
        words.append(f"nothing fits in what is free: `shoal place … {flag}` places it all the same")
    return Group(table, *(Text(w, style="dim") for w in words))


def fits_table(answer: Fits) -> RenderableType:
    """Models and whether they could be placed now."""
    table = _table("model", "size", "memory", "tokens/s", "layout, or what keeps it from being placed")
    for f in answer.models:
        ref, _, commit = f.model.partition("@")
        p = f.preview
        table.add_row(
            f"{ref} ({commit[:8]})",
            show_bytes(f.size_bytes),
            Text(f.tier or "does not", style=_TIER_STYLES.get(f.tier, "red")),
            _speed(p.tokens_per_s) if p else "-",
            p.layout if p else f.why,
        )
    return table


def rebalances_table(answer: Rebalances) -> RenderableType:
    """Instances that would stand better elsewhere."""
    if not answer.rebalances:
        return Text("no instance would stand notably better elsewhere")
    table = _table("instance", "gain", "now", "better", "to download")
    for r in answer.rebalances:
        table.add_row(
            r.instance,
            f"{r.gain:.2g}x" + (f", {r.now.tier} → {r.better.tier}" if r.now.tier != r.better.tier else ""),
            r.now.layout,
            r.better.layout,
            show_bytes(r.better.fetch_bytes) if r.better.fetch_bytes else "-",
        )
    words = "`shoal rebalance INSTANCE` moves one; it does not answer while it does. Gains are predictions"
    return Group(table, Text(words, style="dim"))


def _speed(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 100 else f"{tokens_per_s:.2g}"


def how_it_stands(instance: InstanceRow) -> Text:
    """An instance's phase, and while it is not ready that of its stages."""
    words = instance.phase
    if instance.error is not None:
        words += f": {instance.error.message}"
    elif instance.phase == "starting":
        words += "".join(f", {s.node} {s.phase}" for s in instance.stages if s.phase and s.phase != "ready")
    return Text(words, style=_PHASE_STYLES.get(instance.phase, ""))
