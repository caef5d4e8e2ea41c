"""What a node's storage holds, plans and verified, as lines for a person. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from shoal_cli.api.schema import VerifyView
from shoal_common.messages.storage import (
    EvictionPlan,
    LeaseState,
    LibraryState,
    ShardState,
    StorageState,
    VolumeState,
)
from shoal_common.messages.views import StorageView
from shoal_common.units import format_bytes, format_count, format_duration


def storage_lines(views: Sequence[StorageView], now_s: float) -> list[str]:
    """Return what deserves a line under the table of disks."""
    lines: list[str] = []
    for view in views:
        node, state = view.node, view.storage
        if state is None:
            continue
        if state.free_bytes == 0:
            lines.append(f"{node}: the disk is full: `shoal rm` or `shoal gc` frees space")
        if state.reserved_bytes:
            lines.append(f"{node}: {format_bytes(state.reserved_bytes)} reserved for downloads")
        lines += [
            f"{node}: {format_bytes(n)} kept for the paused download of {m}"
            for m, n in state.paused_downloads.items()
        ]
        lines += [f"{node}: data of the abandoned download of {model}" for model in state.ended_downloads]
        lines += [f"{node}: {shard_text(shard)}" for shard in view.shards]
        lines += [f"{node}: {model} is pinned" for model in state.pinned]
        lines += [f"{node}: {_lease_text(lease, now_s)}" for lease in state.leases]
        lines += [f"{node}: corrupt blob {blob[:16]}… in quarantine" for blob in state.quarantined]
        lines += [
            f"{node}: seals of node {sealer} do not count: it sealed a corrupt blob"
            for sealer in state.distrusted_sealers
        ]
        lines += incomplete_model_warnings(node, state)
        lines += foreign_file_warnings(node, state)
        lines += [f"{node}: {volume_text(volume)}" for volume in state.volumes]
        for library in state.libraries:
            lines += [f"{node}: {line}" for line in library_lines(library)]
        lines += [f"{node}: {name} is set by the environment" for name in state.overridden_by_env]
    return lines


def incomplete_model_warnings(node: str, state: StorageState) -> list[str]:
    """Return the models that have lost files, each with what repairs it."""
    return [
        f"{node}: {model} is incomplete: `shoal repair {model} --node {node}` repairs it"
        for model in state.incomplete
    ]


def foreign_file_warnings(node: str, state: StorageState) -> list[str]:
    """Return what to know of files that storage did not put there, and of a missing store."""
    lines = []
    if state.store_missing:
        lines.append(f"{node}: the store is missing: mount its disk, or put it back")
    if state.unverified_count:
        copied = "1 copied-in file" if state.unverified_count == 1 else f"{state.unverified_count} copied-in files"
        lines.append(f"{node}: {copied}, {format_bytes(state.unverified_bytes)}, to be verified before use")
    if state.foreign_count:
        foreign = format_count(state.foreign_count, "foreign file")
        first = ", ".join(state.foreign_files) + (", …" if state.foreign_count > len(state.foreign_files) else "")
        lines.append(f"{node}: {foreign}, {format_bytes(state.foreign_bytes)}, never deleted: {first}")
    return lines


def shard_text(shard: ShardState) -> str:
    """Return a shard for a person: `layers 0-13 of org/name (73e3c0a1): 1.2 GB of 2.4 GB`."""
    layers = ", ".join(f"{first}-{last - 1}" for first, last in shard.layers)
    sizes = f"{format_bytes(shard.size_bytes)} of {format_bytes(shard.total_bytes)}"
    return f"layers {layers} of {shard.repo} ({shard.commit[:8]}): {sizes}"


def _lease_text(lease: LeaseState, now_s: float) -> str:
    holder = f"{lease.holder} (pid {lease.pid})" if lease.pid else lease.holder
    return f"{lease.model} is in use by {holder}, for {format_duration(max(now_s - lease.since_s, 0))}"


def volume_text(volume: VolumeState) -> str:
    """Return a volume for a person."""
    if volume.error:
        return f"volume {volume.path} is not used: {volume.error}"
    text = f"volume {volume.path}: {format_count(volume.blob_count, 'blob')}, {format_bytes(volume.used_bytes)}; "
    text += f"{format_bytes(volume.free_bytes)} free, {format_bytes(volume.headroom_bytes)} of it headroom"
    if volume.reserved_bytes:
        text += f", {format_bytes(volume.reserved_bytes)} reserved"
    if volume.duplicate_bytes:
        text += f"; {format_bytes(volume.duplicate_bytes)} of duplicates: `shoal gc` deletes them"
    return text


def library_lines(library: LibraryState) -> list[str]:
    """Return a library for a person."""
    if library.error:
        return [f"library {library.path} cannot be read: {library.error}"]
    name = f"library {library.path}"
    lines = [f"{name}: {format_count(library.model_count, 'model')}"]
    if library.unhashed_count:
        to_hash = (
            f"{format_count(library.unhashed_count, 'model')} to be hashed, {format_bytes(library.unhashed_bytes)}"
        )
        lines.append(f"{name}: {to_hash}")
    lines += [f"{name}: ignored {directory}: {reason}" for directory, reason in library.rejected.items()]
    if (more := library.rejected_count - len(library.rejected)) > 0:
        lines.append(f"{name}: ignored {more} more; `shoal logs storage` says why")
    return lines


def plan_lines(node: str, required_bytes: int, plan: EvictionPlan, now_s: float) -> list[str]:
    """Return a dry run of eviction for a person; `required_bytes`: the free space that was asked for."""
    asked = format_bytes(required_bytes)
    if plan.required_bytes <= 0:
        return [f"{node}: {asked} are free already; nothing would be evicted"]
    needed = format_bytes(plan.required_bytes)
    if not plan.enough:
        lines = [f"{node}: cannot free {asked}: {needed} needed, {format_bytes(plan.evictable_bytes)} evictable"]
        return lines + [f"  keeps {model}: {reason}" for model, reason in sorted(plan.protected.items())]
    lines = [f"{node}: to have {asked} free, {needed} must go; this would evict {format_bytes(plan.freed_bytes)}:"]
    if plan.garbage:
        lines.append(f"  {format_count(len(plan.garbage), 'unreferenced blob')}, {format_bytes(plan.garbage_bytes)}")
    for download in plan.ended_downloads:
        lines.append(f"  the abandoned download of {download.model}, {format_bytes(download.freed_bytes)}")
    for victim in plan.victims:
        age = f"last used {format_duration(max(now_s - victim.last_use_s, 0))} ago"
        lines.append(f"  {victim.model}, {format_bytes(victim.freed_bytes)}, {age}")
    return lines


def verify_line(node: str, view: VerifyView) -> str:
    """Return a node's verification on one line."""
    checked = f"{node}: verified {format_count(view.checked, 'blob')}, {format_bytes(view.checked_bytes)}"
    leaves = f" ({format_count(view.bad_leaves, 'corrupt leaf')})" if view.bad_leaves else ""
    damage = [f"{len(view.corrupt)} corrupt and in quarantine{leaves}"] if view.corrupt else []
    damage += [f"{len(view.missing)} missing"] if view.missing else []
    if view.incomplete and not damage:
        damage = [f"{format_count(len(view.incomplete), 'model')} incomplete from before"]
    return f"{checked}: {', '.join(damage) or 'all intact'}"


def suspect_instance_lines(view: VerifyView) -> list[str]:
    """Return the instances that may have loaded corrupt bytes."""
    return [f"  instance {i} may have loaded corrupt bytes: `shoal stop {i}`" for i in view.instances]
