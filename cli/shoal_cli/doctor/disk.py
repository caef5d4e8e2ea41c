"""The store and its disks: room, inodes, file systems, what is mounted, the reserve. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from shoal_cli.doctor.finding import Finding, or_ok
from shoal_cli.sizes import show_bytes
from shoal_common.filesystem import LYING_LOCKS
from shoal_common.messages.records import StorageState

DISK, ROOTS = "disk", "roots"
DEFAULT_HEADROOM_BYTES = 1 << 30
DEFAULT_RESERVE_BYTES = 64 << 20
"""What storage takes where nothing is set; a test holds both equal to storage's own."""
RESERVE_WANTS = 4
"""Storage makes the reserve when so many times its size is free beside the headroom."""
FEW_INODES = 10_000
HOME_NEEDS_BYTES = 256 << 20
"""For NATS's store, logs and settings, where the home is on another disk than the store."""
QUOTA_NEARLY = 0.95


class FileSystem(msgspec.Struct, frozen=True, kw_only=True):
    """The file system that holds a path, or would."""

    path: str
    there: bool = True
    """Whether the path itself exists."""
    error: str = ""
    """Why it cannot be looked at."""
    kind: str = ""
    device: int = 0
    read_only: bool = False
    free_bytes: int = 0
    total_bytes: int = 0
    inodes_free: int = 0
    inodes_total: int = 0
    """0: it has no table of them."""


class DiskFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of this node's disks."""

    store: FileSystem
    home: FileSystem
    made: bool = False
    """Whether there is a store: it has its VERSION."""
    reserve_bytes: int = 0
    """What the reserve file holds."""
    reserve_wanted_bytes: int = DEFAULT_RESERVE_BYTES
    headroom_bytes: int = DEFAULT_HEADROOM_BYTES
    quota_bytes: int | None = None
    settings_error: str = ""
    """What is wrong with `[storage]` of node.toml or the environment."""
    further: Sequence[FileSystem] = ()
    """Further roots that the store remembers; `there` says whether it is that root that is found there."""
    read_only_roots: Sequence[FileSystem] = ()
    state: StorageState | None = None
    """What storage itself says; None where nobody could ask."""
    storage_runs: bool = False


def judge(facts: DiskFacts) -> list[Finding]:
    """What is wrong with them: two checks."""
    return _disk(facts) + _roots(facts)


def _disk(facts: DiskFacts) -> list[Finding]:
    store, state = facts.store, facts.state
    wrong: list[Finding] = []
    if facts.settings_error:
        wrong.append(Finding(DISK, "problem", facts.settings_error, "correct it, then `shoal restart storage`"))
    if store.error:
        remedy = (
            "mount its disk, or give this user the right to it; storage.path in node.toml says where the store is"
        )
        words = f"the store at {store.path} cannot be looked at: {store.error}"
        return [*wrong, Finding(DISK, "problem", words, remedy, store.path)]
    if state is not None and state.store_away:
        words = f"the store is not at {store.path} any more: its disk was unmounted, or it was moved"
        remedy = "mount it again; its models come back by themselves"
        return [*wrong, Finding(DISK, "problem", words, remedy, store.path)]
    if facts.storage_runs and not facts.made:
        words = f"storage runs, and there is no store at {store.path}"
        remedy = "is the disk mounted that had it? Where there never was one: `shoal logs storage`"
        wrong.append(Finding(DISK, "problem", words, remedy, store.path))
    wrong += _file_system(store, "the store")
    wrong += _room(facts)
    wrong += _quota(facts)
    wrong += _reserve(facts)
    if facts.home.device != store.device and not facts.home.error:
        wrong += _file_system(facts.home, "the home")
        if facts.home.free_bytes < HOME_NEEDS_BYTES:
            left = show_bytes(facts.home.free_bytes)
            words = f"the disk of {facts.home.path} has {left} free, which NATS and logs need"
            wrong.append(Finding(DISK, "problem", words, "make room there", facts.home.path))
    free = f"{show_bytes(store.free_bytes)} free of {show_bytes(store.total_bytes)}"
    what = f"the store at {store.path} ({store.kind or 'file system not known'}): {free}"
    if not facts.made:
        what = f"no store yet at {store.path}: {free} there"
    return or_ok(DISK, wrong, what)


def _file_system(found: FileSystem, what: str) -> list[Finding]:
    wrong = []
    if found.kind in LYING_LOCKS:
        words = f"{what} at {found.path} is on {found.kind}, whose locks do not keep two machines apart"
        remedy = "move it to a disk of this machine: storage.path in node.toml for the store, SHOAL_HOME for the home"
        wrong.append(Finding(DISK, "problem", words, remedy, found.path))
    if found.read_only:
        words = f"{what} at {found.path} is on a file system that is mounted read-only"
        remedy = "a disk with errors is mounted so: see `dmesg`, check it, and mount it read-write again"
        wrong.append(Finding(DISK, "problem", words, remedy, found.path))
    if found.inodes_total and found.inodes_free < FEW_INODES:
        words = f"the file system of {found.path} has {found.inodes_free} inodes left of {found.inodes_total}"
        remedy = "each file takes one: remove small files, or move the store to another file system"
        wrong.append(Finding(DISK, "warning" if found.inodes_free else "problem", words, remedy, found.path))
    return wrong


def _room(facts: DiskFacts) -> list[Finding]:
    free = facts.store.free_bytes + facts.reserve_bytes
    headroom = facts.state.headroom_bytes if facts.state else facts.headroom_bytes
    words = f"{facts.store.path} has {show_bytes(free)} free, and {show_bytes(headroom)} shall stay free"
    remedy = "`shoal rm` a model, `shoal gc`, or make room beside Shoal; `shoal storage set --headroom` changes it"
    if free < headroom:
        return [Finding(DISK, "problem", f"{words}: nothing comes in", remedy, facts.store.path)]
    if free < 2 * headroom:
        return [Finding(DISK, "warning", f"{words}: only small models still fit", remedy, facts.store.path)]
    return []


def _quota(facts: DiskFacts) -> list[Finding]:
    state = facts.state
    if state is None or state.quota_bytes is None:
        return []
    taken, quota = state.used_bytes + state.reserved_bytes, state.quota_bytes
    if taken <= QUOTA_NEARLY * quota:
        return []
    words = f"{show_bytes(taken)} of the quota of {show_bytes(quota)} are used or promised"
    if state.eviction_policy == "lru":
        # That is how it is meant to be: what comes makes room. Only what is more than the quota is told.
        return [] if taken <= quota else [Finding(DISK, "warning", f"{words}: what comes next makes room first")]
    remedy = "`shoal rm` a model, or `shoal storage set --max-storage … --eviction-policy lru`"
    return [Finding(DISK, "warning", f"{words}, and the policy is manual: what does not fit is refused", remedy)]


def _reserve(facts: DiskFacts) -> list[Finding]:
    wanted = facts.reserve_wanted_bytes
    if not (facts.made and facts.storage_runs and wanted) or facts.reserve_bytes:
        return []
    headroom = facts.state.headroom_bytes if facts.state else facts.headroom_bytes
    if facts.store.free_bytes - headroom < RESERVE_WANTS * wanted:
        words = "the reserve file is not there: storage gave it up, for the disk is full or nearly so"
        return [Finding(DISK, "warning", words, "make room: storage then makes it again by itself")]
    words = f"there is room and no reserve file in {facts.store.path}"
    remedy = "storage makes it within a minute; if it stays away, `shoal logs storage` says why"
    return [Finding(DISK, "warning", words, remedy)]


def _roots(facts: DiskFacts) -> list[Finding]:
    wrong = []
    said = {r.path: r.error for r in facts.state.roots} if facts.state else {}
    for root in facts.further:
        error = said.get(root.path) or root.error
        if error or not root.there:
            words = f"the further root {root.path} is not used: {error or 'it is not there'}"
            remedy = (
                "mount its disk: its models come back by themselves; a disk that is gone for good: "
                f"`shoal storage set --remove-root {root.path}`"
            )
            wrong.append(Finding(ROOTS, "problem", words, remedy, root.path))
            continue
        wrong += [msgspec.structs.replace(f, check=ROOTS) for f in _file_system(root, "the further root")]
        if root.free_bytes < facts.headroom_bytes:
            words = f"the further root {root.path} has {show_bytes(root.free_bytes)} free: no more comes to it"
            wrong.append(Finding(ROOTS, "warning", words, "make room there", root.path))
    told = {r.path: r.error for r in facts.state.read_only_roots} if facts.state else {}
    for root in facts.read_only_roots:
        error = told.get(root.path) or root.error or ("" if root.there else "it is not there")
        if error:
            words = f"the read-only root {root.path} is not read: {error}"
            remedy = "mount it or give this user the right to read it; or `shoal storage set --no-read-only-roots`"
            wrong.append(Finding(ROOTS, "warning", words, remedy, root.path))
    count = len(facts.further) + len(facts.read_only_roots)
    return or_ok(ROOTS, wrong, f"{count} besides the store, all there" if count else "none besides the store")
