"""The store and its disks: free space, inodes, file systems, mounts, the ballast, volumes and libraries. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from shoal_cli.doctor.finding import Finding, or_ok
from shoal_common.messages.storage import StorageState
from shoal_common.settings.node import StorageSettings
from shoal_common.store.mounts import NETWORK_FILE_SYSTEMS
from shoal_common.units import format_bytes

DISK, VOLUMES = "disk", "volumes"
BALLAST_FREE_FACTOR = 4
"""Storage creates the ballast when this many times its size is free beside the headroom; a test compares the two."""
MIN_INODES = 10_000
MIN_HOME_BYTES = 256 << 20
"""For NATS's store, logs and settings, where the home is on another disk than the store."""
QUOTA_WARNING_SHARE = 0.95


class FileSystemInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The file system that holds a path, or would."""

    path: str
    exists: bool = True
    """Whether the path itself does."""
    error: str = ""
    """Why it cannot be read."""
    kind: str = ""
    device: int = 0
    read_only: bool = False
    free_bytes: int = 0
    total_bytes: int = 0
    inodes_free: int = 0
    inodes_total: int = 0
    """0: it has no inode table."""


class DiskFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of this node's disks."""

    store: FileSystemInfo
    home: FileSystemInfo
    store_exists: bool = False
    """Whether there is a store: it has its VERSION."""
    ballast_bytes: int = 0
    """What deleting the ballast file would free."""
    settings: StorageSettings = StorageSettings()
    """Those of node.toml and the environment, with the default in place of an invalid one."""
    settings_errors: Sequence[str] = ()
    """What is wrong with the invalid ones, or with node.toml."""
    volumes: Sequence[FileSystemInfo] = ()
    """Volumes that the store remembers; `exists`: whether that very volume is mounted at its path."""
    libraries: Sequence[FileSystemInfo] = ()
    state: StorageState | None = None
    """What storage publishes; None where nobody could ask."""
    storage_runs: bool = False


def check(facts: DiskFacts) -> list[Finding]:
    """Return what is wrong with them: two checks."""
    return _disk(facts) + _volumes(facts)


def _disk(facts: DiskFacts) -> list[Finding]:
    store, state = facts.store, facts.state
    wrong: list[Finding] = []
    for error in facts.settings_errors:
        wrong.append(Finding(DISK, "problem", error, "correct it, then run `shoal restart storage`"))
    if store.error:
        remedy = "mount its disk, or give this user access; storage.path in node.toml says where the store is"
        what = f"the store at {store.path} cannot be read: {store.error}"
        return [*wrong, Finding(DISK, "problem", what, remedy, store.path)]
    if state is not None and state.store_missing:
        what = f"the store is missing from {store.path}: its disk was unmounted, or it was moved"
        remedy = "mount it again; its models come back by themselves"
        return [*wrong, Finding(DISK, "problem", what, remedy, store.path)]
    if facts.storage_runs and not facts.store_exists:
        what = f"storage is running, but there is no store at {store.path}"
        remedy = "check that its disk is mounted; if there never was a store, see `shoal logs storage`"
        wrong.append(Finding(DISK, "problem", what, remedy, store.path))
    wrong += _file_system(store, "the store")
    wrong += _free_space(facts)
    wrong += _quota(facts)
    wrong += _ballast(facts)
    if facts.home.device != store.device and not facts.home.error:
        wrong += _file_system(facts.home, "the home")
        if facts.home.free_bytes < MIN_HOME_BYTES:
            free = format_bytes(facts.home.free_bytes)
            what = f"the disk of {facts.home.path} has {free} free; NATS and logs need more"
            wrong.append(Finding(DISK, "problem", what, "free some space there", facts.home.path))
    free = f"{format_bytes(store.free_bytes)} free of {format_bytes(store.total_bytes)}"
    what = f"the store at {store.path} ({store.kind or 'unknown file system'}): {free}"
    if not facts.store_exists:
        what = f"no store yet at {store.path}: {free}"
    return or_ok(DISK, wrong, what)


def _file_system(info: FileSystemInfo, name: str) -> list[Finding]:
    wrong = []
    if info.kind in NETWORK_FILE_SYSTEMS:
        what = f"{name} at {info.path} is on {info.kind}, whose locks do not hold between machines"
        remedy = "move it to a local disk: storage.path in node.toml for the store, SHOAL_HOME for the home"
        wrong.append(Finding(DISK, "problem", what, remedy, info.path))
    if info.read_only:
        what = f"{name} at {info.path} is on a file system that is mounted read-only"
        remedy = "Linux remounts a disk with errors so: see `dmesg`, check it, and mount it read-write again"
        wrong.append(Finding(DISK, "problem", what, remedy, info.path))
    if info.inodes_total and info.inodes_free < MIN_INODES:
        what = f"the file system of {info.path} has {info.inodes_free} inodes left of {info.inodes_total}"
        remedy = "each file takes one: delete small files, or move the store to another file system"
        wrong.append(Finding(DISK, "warning" if info.inodes_free else "problem", what, remedy, info.path))
    return wrong


def _free_space(facts: DiskFacts) -> list[Finding]:
    free = facts.store.free_bytes + facts.ballast_bytes
    headroom = (facts.state or facts.settings).headroom_bytes
    what = f"{facts.store.path} has {format_bytes(free)} free, of which {format_bytes(headroom)} is headroom"
    remedy = "`shoal rm` a model, `shoal gc`, or free space beside Shoal; `shoal storage set --headroom` changes it"
    if free < headroom:
        return [Finding(DISK, "problem", f"{what}: no model fits", remedy, facts.store.path)]
    if free < 2 * headroom:
        return [Finding(DISK, "warning", f"{what}: only small models still fit", remedy, facts.store.path)]
    return []


def _quota(facts: DiskFacts) -> list[Finding]:
    state = facts.state
    if state is None or state.quota_bytes is None:
        return []
    taken, quota = state.used_bytes + state.reserved_bytes, state.quota_bytes
    if taken <= QUOTA_WARNING_SHARE * quota:
        return []
    what = f"{format_bytes(taken)} of the quota of {format_bytes(quota)} are used or reserved"
    if state.eviction_policy == "lru":
        # Intended: a new model evicts old ones. Only use beyond the quota is worth a line.
        return [] if taken <= quota else [Finding(DISK, "warning", f"{what}: the next model evicts others first")]
    remedy = "`shoal rm` a model, or `shoal storage set --max-storage … --eviction-policy lru`"
    return [Finding(DISK, "warning", f"{what}, and the policy is manual: larger models are refused", remedy)]


def _ballast(facts: DiskFacts) -> list[Finding]:
    target = facts.settings.ballast_bytes
    if not (facts.store_exists and facts.storage_runs and target) or facts.ballast_bytes:
        return []
    headroom = (facts.state or facts.settings).headroom_bytes
    if facts.store.free_bytes - headroom < BALLAST_FREE_FACTOR * target:
        what = "there is no ballast file: storage deleted it because the disk is full or nearly so"
        return [Finding(DISK, "warning", what, "free some space: storage then creates it again")]
    what = f"there is space but no ballast file in {facts.store.path}"
    remedy = "storage creates it within a minute; if it does not, `shoal logs storage` says why"
    return [Finding(DISK, "warning", what, remedy)]


def _volumes(facts: DiskFacts) -> list[Finding]:
    wrong = []
    volume_errors = {v.path: v.error for v in facts.state.volumes} if facts.state else {}
    for volume in facts.volumes:
        error = volume_errors.get(volume.path) or volume.error
        if error or not volume.exists:
            what = f"the volume {volume.path} is not used: {error or 'it does not exist'}"
            remedy = (
                "mount its disk: its models come back by themselves; if the disk is gone for good: "
                f"`shoal storage set --remove-volume {volume.path}`"
            )
            wrong.append(Finding(VOLUMES, "problem", what, remedy, volume.path))
            continue
        wrong += [msgspec.structs.replace(f, check=VOLUMES) for f in _file_system(volume, "the volume")]
        if volume.free_bytes < facts.settings.headroom_bytes:
            what = (
                f"the volume {volume.path} has {format_bytes(volume.free_bytes)} free: nothing more is stored there"
            )
            wrong.append(Finding(VOLUMES, "warning", what, "free some space there", volume.path))
    library_errors = {x.path: x.error for x in facts.state.libraries} if facts.state else {}
    for library in facts.libraries:
        error = library_errors.get(library.path) or library.error or ("" if library.exists else "it does not exist")
        if error:
            what = f"the library {library.path} cannot be read: {error}"
            remedy = (
                "mount it, or give this user the right to read it, or stop serving it: "
                f"`shoal storage set --remove-library {library.path}`"
            )
            wrong.append(Finding(VOLUMES, "warning", what, remedy, library.path))
    count = len(facts.volumes) + len(facts.libraries)
    return or_ok(VOLUMES, wrong, f"{count} volumes and libraries, all usable" if count else "no volumes or libraries")
