"""Status, models and instances as tables for people."""

from __future__ import annotations

import time
from collections.abc import Set

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from shoal_cli.render.console import UNLIMITED
from shoal_cli.render.progress import progress_line
from shoal_cli.render.storage_text import foreign_file_warnings, incomplete_model_warnings, shard_text
from shoal_common.messages.downloads import ENDED_PHASES
from shoal_common.messages.placement import FittingModels, Previews, Rebalances
from shoal_common.messages.storage import StorageState
from shoal_common.messages.views import InstanceView, ModelView, NodeView, StatusView, StorageView
from shoal_common.names import commit_of, repo_of
from shoal_common.units import format_bytes, format_duration

_PHASE_STYLES = {"ready": "green", "starting": "yellow", "degraded": "yellow", "failed": "red"}
_TIER_STYLES = {"fits": "green", "tight": "yellow", "force": "red"}
_MAX_VERSION_CHARS = 40
_LINKS = {"thunderbolt": "Thunderbolt", "ethernet": "Ethernet", "wifi": "Wi-Fi", "virtual": "a tunnel"}
"""How this node reaches another; nothing is shown for one on the same machine."""


class UnbrokenTable(Table):
    """A table that breaks no word, such as an id: it becomes wider than the terminal instead."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw it at least as wide as its longest words need; columns of single words keep their width."""
        unlimited = options.update(max_width=UNLIMITED)
        for column in self.columns:
            cells = [Measurement.get(console, unlimited, cell) for cell in (column.header, *column.cells)]
            column.min_width = max(cell.minimum for cell in cells)
            column.no_wrap = column.min_width == max(cell.maximum for cell in cells)
        needed = Measurement.get(console, unlimited, self).minimum
        return super().__rich_console__(console, options.update(width=max(options.max_width, needed)))


def _table(*columns: str) -> Table:
    table = UnbrokenTable(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for name in columns:
        right = name in ("size", "used", "free", "memory", "headroom")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    return table


def render_status(status: StatusView) -> RenderableType:
    """Return everything that `shoal status` shows."""
    parts: list[RenderableType] = [nodes_table(status)]
    parts += [Text(line) for n in status.nodes if n.storage for line in foreign_file_warnings(n.node, n.storage)]
    parts += [Text(line, style="red") for line in incomplete_lines(status)]
    if not status.nats_connected:
        parts.insert(0, Text("this gateway has lost NATS: what follows may be outdated", style="red"))
    running = [d for d in status.downloads if d.phase not in ENDED_PHASES]
    if running:
        parts += [Text("\ndownloads", style="bold"), *(Text(f"{d.model}  {progress_line(d, {})}") for d in running)]
    if status.models:
        down = {n.node for n in status.nodes if not n.live}
        parts += [Text("\nmodels", style="bold"), models_table(status.models, down)]
    parts += [Text(f"{shard.node}: {shard_text(shard)}") for shard in status.shards]
    if status.instances:
        parts += [Text("\ninstances", style="bold"), instances_table(status.instances)]
    return Group(*parts)


def incomplete_lines(status: StatusView) -> list[str]:
    """Return the incomplete models of all nodes, each with what repairs it."""
    return [line for n in status.nodes if n.storage for line in incomplete_model_warnings(n.node, n.storage)]


def nodes_table(status: StatusView) -> RenderableType:
    """Return the nodes, their memory and disks."""
    table = _table("node", "state", "memory", "used", "free", "quota, policy")
    for n in status.nodes:
        name = Text(n.node, style="bold" if n.node == status.node else "")
        s = n.storage
        table.add_row(
            name,
            _node_state(n, status.version),
            f"{format_bytes(n.memory_available_bytes)} of {format_bytes(n.memory_total_bytes)}"
            if n.memory_total_bytes
            else "-",
            _used(s) if s else "-",
            format_bytes(s.free_bytes) if s else "-",
            f"{_quota(s)}, {s.eviction_policy}" if s else "-",
        )
    return table


def _used(storage: StorageState) -> str:
    if not storage.quota_bytes:
        return format_bytes(storage.used_bytes)
    return f"{format_bytes(storage.used_bytes)} ({100 * storage.used_bytes / storage.quota_bytes:.0f} %)"


def _quota(storage: StorageState) -> str:
    return "none" if storage.quota_bytes is None else format_bytes(storage.quota_bytes)


def storage_table(views: list[StorageView]) -> RenderableType:
    """Return the nodes' disks and their settings."""
    table = _table("node", "used", "free", "quota", "policy", "headroom", "models")
    for view in views:
        s = view.storage
        free = view.disk_free_bytes if view.disk_free_bytes is not None else s.free_bytes if s else None
        table.add_row(
            Text(view.node if view.live else f"{view.node} (down)", style="" if view.live else "red"),
            _used(s) if s else "-",
            "-" if free is None else format_bytes(free),
            _quota(s) if s else "-",
            s.eviction_policy if s else "-",
            format_bytes(s.headroom_bytes) if s else "-",
            str(s.model_count) if s else "-",
        )
    return table


def _node_state(node: NodeView, own_version: str) -> Text:
    if node.other_versions:
        versions = ", ".join(sorted({version[:_MAX_VERSION_CHARS] for version in node.other_versions.values()}))
        return Text(f"ignored: runs Shoal {versions}, this is {own_version}", style="red")
    if not node.live:
        since_s = node.down_since_s
        return Text("down" if since_s is None else f"down for {format_duration(time.time() - since_s)}", style="red")
    if node.missing_services:
        return Text(f"without {', '.join(node.missing_services)}", style="yellow")
    uptime_s = min((s.uptime_s for s in node.services.values()), default=0.0)
    link = f", by {_LINKS[node.link]}" if node.link in _LINKS else ""
    if node.drained:
        return Text(f"drained, up {format_duration(uptime_s)}{link}", style="yellow")
    return Text(f"up {format_duration(uptime_s)}{link}", style="green")


def models_table(models: list[ModelView], down: Set[str] = frozenset()) -> RenderableType:
    """Return the models and the nodes that hold them; `down`: nodes that are."""
    table = _table("model", "commit", "size", "nodes")
    for m in models:
        table.add_row(
            m.repo,
            m.commit[:8],
            format_bytes(m.size_bytes),
            ", ".join(f"{n} (down)" if n in down else n for n in m.nodes),
        )
    # Below the table and unbroken: a path folded into a narrow column cannot be copied.
    places = [
        f"{m.repo} on {n} is in {m.library_directory[n]}" for m in models for n in m.nodes if n in m.library_directory
    ]
    return Group(table, *(Text(place, style="dim", no_wrap=True, overflow="ignore") for place in places))


def instances_table(instances: list[InstanceView]) -> RenderableType:
    """Return the instances and their stages."""
    table = _table("instance", "model", "state", "stages")
    for i in instances:
        stages = ", ".join(
            f"{s.node}[{s.first_layer}-{s.last_layer - 1}]"
            if s.first_layer is not None and s.last_layer is not None
            else s.node
            for s in i.stages
        )
        table.add_row(i.id, i.repo, instance_status_text(i), stages or ", ".join(i.nodes))
    return table


def previews_table(answer: Previews) -> RenderableType:
    """Return the possible layouts, the best first."""
    table = _table("layout", "memory", "tokens/s", "first token", "to download", "memory needed / free")
    for p in answer.previews:
        stages = ", ".join(
            f"{s.node} {format_bytes(s.needed_bytes)} / {format_bytes(s.available_bytes)}"
            + (f" (frees {format_bytes(s.bytes_to_free)} first)" if s.bytes_to_free else "")
            for s in p.stages
        )
        table.add_row(
            p.layout,
            Text(p.tier, style=_TIER_STYLES[p.tier]),
            _speed(p.tokens_per_s),
            f"{p.first_token_s * 1000:.3g} ms",
            format_bytes(p.fetch_bytes) if p.fetch_bytes else "-",
            stages,
        )
    notes = [f"for {answer.model} with {answer.context_tokens} tokens of context; times are predictions"]
    if answer.estimated:
        notes.append("the model's architecture is unknown: its memory need is an upper bound")
    if any(s.link_s and not s.link_measured for p in answer.previews for s in p.stages):
        notes.append("not all links between these nodes are measured yet; try again in a moment")
    if answer.previews[0].is_low_memory:
        flag = "--allow-low-memory" if answer.previews[0].tier == "tight" else "--force"
        notes.append(f"nothing fits in free memory: `shoal place … {flag}` places it anyway")
    return Group(table, *(Text(note, style="dim") for note in notes))


def fits_table(answer: FittingModels) -> RenderableType:
    """Return the models and whether they could be placed now."""
    table = _table("model", "size", "memory", "tokens/s", "layout, or why not")
    for f in answer.models:
        p = f.preview
        table.add_row(
            f"{repo_of(f.model)} ({commit_of(f.model)[:8]})",
            format_bytes(f.size_bytes),
            Text(f.tier or "does not fit", style=_TIER_STYLES.get(f.tier, "red")),
            _speed(p.tokens_per_s) if p else "-",
            p.layout if p else f.reason,
        )
    return table


def rebalances_table(answer: Rebalances) -> RenderableType:
    """Return the instances that have a better placement."""
    if not answer.rebalances:
        return Text("no better placement")
    table = _table("instance", "gain", "now", "better", "to download")
    for r in answer.rebalances:
        table.add_row(
            r.instance,
            f"{r.gain:.2g}x"
            + (f", {r.current.tier} → {r.proposed.tier}" if r.current.tier != r.proposed.tier else ""),
            r.current.layout,
            r.proposed.layout,
            format_bytes(r.proposed.fetch_bytes) if r.proposed.fetch_bytes else "-",
        )
    note = "`shoal rebalance INSTANCE` moves one; it does not answer meanwhile. Gains are predictions"
    return Group(table, Text(note, style="dim"))


def _speed(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 100 else f"{tokens_per_s:.2g}"


def instance_status_text(instance: InstanceView) -> Text:
    """Return an instance's phase, with those of its stages while it starts."""
    text: str = instance.phase
    if instance.error is not None:
        text += f": {instance.error.message}"
    elif instance.phase == "starting":
        text += "".join(
            f", {s.node} {s.phase}" + (f": {s.error.message}" if s.error else "")
            for s in instance.stages
            if s.phase and s.phase != "ready"
        )
    return Text(text, style=_PHASE_STYLES.get(instance.phase, ""))
