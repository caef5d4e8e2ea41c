"""Storage's pure decisions: admission, references, and what a deletion frees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from shoal_common import leafset
from shoal_common.errors import BadInput, BadName, QuotaExceeded
from shoal_common.messages.records import Manifest
from shoal_common.names import ModelRef, check_blob, check_commit, check_file_path
from shoal_common.tensors import check_layers, covers
from shoal_storage.adopted import Adopted, File
from shoal_storage.leases import Lease
from shoal_storage.spread import Space, lacking_bytes, spread

EvictionPolicy = Literal["manual", "lru"]
_GIT = "git-"
_BLOCK_BYTES = 64 << 10
"""The largest block size of common file systems. What a file occupies beyond its bytes is less, and not counted."""


class Partial(msgspec.Struct):
    """A partial blob: its size, the bytes allocated on disk so far, and the models it is for."""

    size_bytes: int
    allocated_bytes: int = 0
    models: set[str] = msgspec.field(default_factory=set)
    leaves: dict[str, int] = msgspec.field(default_factory=dict)
    """The leaves wanted by each model that does not want the whole blob. The other models want all of it."""
    here: int = 0
    """Durable leaves, as of the last reservation. Only used when no model wants the whole blob."""

    @property
    def _is_sparse(self) -> bool:
        """Whether no model wants the whole blob."""
        return bool(self.leaves) and bool(self.models) and self.models <= self.leaves.keys()

    @property
    def promised_leaves(self) -> int:
        """The leaves that may arrive or are already durable."""
        if not self._is_sparse:
            return leafset.whole(self.size_bytes)
        leaves = self.here
        for model in self.models:
            leaves |= self.leaves[model]
        return leaves

    @property
    def promised_bytes(self) -> int:
        """Bytes it may come to occupy; never less than it occupies now, in whole file system blocks."""
        # Read for every partial at every admission: build a leaf set only where one is needed.
        promised = leafset.size_of(self.promised_leaves, self.size_bytes) if self._is_sparse else self.size_bytes
        return promised if self.allocated_bytes < promised + _BLOCK_BYTES else self.allocated_bytes

    def wanted_by(self, model: str, leaves: int | None) -> Partial:
        """Return a copy that this model also wants: these leaves, or all of it."""
        others = {m: x for m, x in self.leaves.items() if m != model}
        by_model = others if leaves is None else {**others, model: leaves}
        return msgspec.structs.replace(self, models={*self.models, model}, leaves=by_model)

    def wanted_by_only(self, model: str) -> Partial:
        """Return a copy that only this model wants."""
        return msgspec.structs.replace(self, models={model})

    def without(self, model: str) -> Partial:
        """Return a copy that this model no longer wants."""
        rest = {m: x for m, x in self.leaves.items() if m != model}
        return msgspec.structs.replace(self, models=self.models - {model}, leaves=rest)


class Part(msgspec.Struct, frozen=True):
    """A shard: the layers of a model that are here, `[first, last)` each, when the whole model is not."""

    manifest: Manifest
    layers: list[list[int]]
    leaves: dict[str, int]
    """The leaves needed of each blob that is not needed whole; empty for a blob that is not needed."""

    @property
    def size_bytes(self) -> int:
        """Bytes that its layers need."""
        return sum(
            leafset.size_of(self.leaves[b], size) if b in self.leaves else size
            for b, size in self.manifest.blob_sizes.items()
        )


class Stamp(msgspec.Struct, frozen=True):
    """The stat of a blob's file. A different stat means another file or changed content."""

    size_bytes: int
    mtime_ns: int
    inode: int
    proven: bool = False
    """Whether the file carries a verification stamp (`verification_stamp.py`)."""
    further: str = ""
    """The id of the volume that holds it; "" for the store."""

    def same_file(self, other: Stamp) -> bool:
        """Whether nothing was written in between."""
        own = self.size_bytes, self.mtime_ns, self.inode, self.further
        return own == (other.size_bytes, other.mtime_ns, other.inode, other.further)


class Unknown(msgspec.Struct, frozen=True):
    """Foreign files in the store: counted, never deleted. `paths`: the first few, relative to the store."""

    count: int = 0
    size_bytes: int = 0
    paths: tuple[str, ...] = ()


class Ledger(msgspec.Struct):
    """What the disk is known to hold. The disk is authoritative; this is rebuilt from it at start and follows it."""

    blobs: dict[str, int] = msgspec.field(default_factory=dict)
    """Size in bytes of each blob, by sha256."""
    where: dict[str, str] = msgspec.field(default_factory=dict)
    """The id of the volume that a blob is in, arrives in, or is quarantined in. Blobs not listed are in the store."""
    doubles: dict[str, dict[str, int]] = msgspec.field(default_factory=dict)
    """Extra copies of blobs: bytes by the volume ("" for the store) of each redundant file."""
    unproven: dict[str, Stamp] = msgspec.field(default_factory=dict)
    """Files with a blob's name that somebody put there. They count as used and become blobs once hashed."""
    wrong: dict[str, Stamp] = msgspec.field(default_factory=dict)
    """Those of them that did not hash to their name, with their stat at that time."""
    unknown: Unknown = msgspec.field(default_factory=Unknown)
    away: bool = False
    """Whether the store is missing from its path. An unmounted disk has lost nothing and offers nothing."""
    partials: dict[str, Partial] = msgspec.field(default_factory=dict)
    manifests: dict[str, Manifest] = msgspec.field(default_factory=dict)
    """Manifests of complete models, by `org/name@commit`."""
    broken: dict[str, Manifest] = msgspec.field(default_factory=dict)
    """Manifests of incomplete models: never published; their remaining blobs wait for a repair or an `rm`."""
    leaving: dict[str, Manifest] = msgspec.field(default_factory=dict)
    """Manifests, in `tombs/`, of models whose deletion failed half-way: not here, and not all gone."""
    promised: dict[str, set[str]] = msgspec.field(default_factory=dict)
    """Blobs, present or arriving, that a running fetch counts on, by `org/name@commit`."""
    quarantined: set[str] = msgspec.field(default_factory=set)
    """Corrupt blobs in quarantine that are still wanted."""
    repairable: dict[str, int] = msgspec.field(default_factory=dict)
    """Of those, the blobs that can be repaired by leaf: bytes on disk that are reused, by sha256."""
    parts: dict[str, Part] = msgspec.field(default_factory=dict)
    """Verified shards, by `org/name@commit`. Their reservations stay."""
    git: dict[str, str] = msgspec.field(default_factory=dict)
    """The sha256 of each committed blob that was named by git's sha1: `git-<sha1>` to sha256."""
    leases: dict[str, Lease] = msgspec.field(default_factory=dict)
    """Live leases, by id."""
    pinned: set[str] = msgspec.field(default_factory=set)
    """Models (`org/name@commit`) that people pinned."""
    last_uses: dict[str, float] = msgspec.field(default_factory=dict)
    """Time of each model's last use, in Unix seconds; for one never used, when it arrived."""
    wanted_s: dict[str, float] = msgspec.field(default_factory=dict)
    """When each arriving model was last known to be wanted, in Unix seconds."""
    ended: set[str] = msgspec.field(default_factory=set)
    """Arriving models whose reservation has ended: nobody wants them, and their bytes are still here."""
    paused: set[str] = msgspec.field(default_factory=set)
    """Arriving models that people paused: wanted, and not fetched."""
    adopted: dict[str, Adopted] = msgspec.field(default_factory=dict)
    """Models of libraries, by `org/name@commit`. Present, but not part of the store: they use no quota and are never
    garbage or victims. Changed by `set_library_models` alone."""
    adopted_blobs: dict[str, File] = msgspec.field(default_factory=dict)
    """Their blobs, by sha256, each with one file that has its bytes."""
    adopted_git: dict[str, str] = msgspec.field(default_factory=dict)
    """Like `sha256_by_git_name`, for blobs of libraries."""

    @property
    def on_disk(self) -> dict[str, Manifest]:
        """Every manifest in the store, of complete and incomplete models."""
        return {**self.manifests, **self.broken}

    @property
    def here(self) -> dict[str, Manifest]:
        """The models that can be pinned, used and removed: those in the store, and those with a shard here."""
        return {**{m: part.manifest for m, part in self.parts.items()}, **self.on_disk}

    def at_rest(self, model: str) -> bool:
        """Whether a model has a shard here and nothing more of it is reserved."""
        part = self.parts.get(model)
        return part is not None and all(
            p.leaves.get(model) == part.leaves.get(b, -1) for b, p in self.partials.items() if model in p.models
        )

    @property
    def offered(self) -> dict[str, Adopted]:
        """The library models, except those that the store has too."""
        return {m: a for m, a in self.adopted.items() if m not in self.manifests and m not in self.broken}

    @property
    def whole(self) -> dict[str, Manifest]:
        """The manifests of all complete models that this node offers."""
        return {**{m: a.manifest for m, a in self.offered.items()}, **self.manifests}

    def bytes_of(self, blob: str) -> int | None:
        """Return the size of a blob that is in the store or a library; None when it is in neither."""
        size_bytes = self.blobs.get(blob)
        if size_bytes is None and blob in self.adopted_blobs:
            size_bytes = self.adopted_blobs[blob].seen.size_bytes
        return size_bytes

    def drop(self, blob: str) -> int:
        """Drop a deleted blob and all its copies. Returns its bytes."""
        self.where.pop(blob, None)
        return self.blobs.pop(blob, 0) + sum(self.doubles.pop(blob, {}).values())

    def forget_places(self) -> None:
        """Drop the volumes of blobs that are no longer known."""
        known = {*self.blobs, *self.partials, *self.unproven, *self.quarantined}
        for blob in [b for b, volume_id in self.where.items() if not volume_id or b not in known]:
            del self.where[blob]

    def adopt(self, models: Mapping[str, Adopted]) -> None:
        """Set the library models, replacing all earlier ones."""
        self.adopted, self.adopted_blobs, self.adopted_git = dict(models), {}, {}
        for model in sorted(models):
            library_model = models[model]
            for f in library_model.manifest.files:
                self.adopted_blobs.setdefault(f.sha256, library_model.files[f.path])
            self.adopted_git.update(library_model.git)

    @property
    def used_bytes(self) -> int:
        """Bytes of all blobs and their extra copies, of the leaves that shards need, and of unverified files."""
        doubled = sum(sum(copies.values()) for copies in self.doubles.values())
        unproven_bytes = sum(stamp.size_bytes for stamp in self.unproven.values())
        return sum(self.blobs.values()) + self.part_bytes + unproven_bytes + doubled

    @property
    def part_bytes(self) -> int:
        """Bytes of the partial blobs' leaves that shards need: present and verified. Shared leaves count once."""
        return sum(self.part_bytes_of(b, p) for b, p in self.partials.items()) if self.parts else 0

    def part_bytes_of(self, blob: str, partial: Partial) -> int:
        """The same, for one partial blob."""
        return leafset.size_of(self.part_leaves(blob), partial.size_bytes)

    def part_leaves(self, blob: str) -> int:
        """The leaves of a blob that shards need; verified, unless the blob is here whole."""
        leaves = 0
        for part in list(self.parts.values()):  # the published state of a volume is computed in a thread
            leaves |= part.leaves.get(blob, 0)
        return leaves

    @property
    def reserved_bytes(self) -> int:
        """Bytes reserved for arriving blobs, and those left by ended reservations, minus those counted as used."""
        return sum(self.promised_bytes(p) for p in self.partials.values()) - self.part_bytes

    @property
    def in_flight_bytes(self) -> int:
        """Bytes reserved and not yet allocated: they will still reduce the file system's free space."""
        return sum(self.in_flight_by_root.values())

    @property
    def in_flight_by_root(self) -> Counter[str]:
        """The same, by volume; "" for the store."""
        in_flight = Counter[str]()
        for blob, p in self.partials.items():
            in_flight[self.where.get(blob, "")] += max(self.promised_bytes(p) - p.allocated_bytes, 0)
        return in_flight

    @property
    def on_its_way(self) -> set[str]:
        """Models with a reservation, ended or not."""
        return {*self.promised, *(m for p in self.partials.values() for m in p.models)}

    def promises(self, partial: Partial) -> bool:
        """Whether a partial blob may still grow: the reservation of one of its models has not ended."""
        return not partial.models or not partial.models <= self.ended

    def promised_bytes(self, partial: Partial, standing: str = "") -> int:
        """Bytes a partial blob may come to occupy by its active reservations; `active_model`'s counts as active."""
        active = partial.models - (self.ended - {standing})
        if partial.models and not active:
            return partial.allocated_bytes
        counted = partial if active == partial.models else msgspec.structs.replace(partial, models=active)
        return counted.promised_bytes

    def needed_bytes(self, blob: str, size_bytes: int, model: str = "", leaves: int | None = None) -> int:
        """Bytes that reserving an absent blob, or leaves of it, for a model adds to what is already reserved."""
        partial = self.partials.get(blob)
        if partial is None:
            return size_bytes if leaves is None else leafset.size_of(leaves, size_bytes)
        after = self.promised_bytes(partial.wanted_by(model, leaves), standing=model)
        return max(0, after - self.promised_bytes(partial))


class Rates(msgspec.Struct, frozen=True):
    """Rate limits for a node's transfers. None: unlimited. Enforced by the fetcher and the fileserver."""

    max_upload_bytes_per_s: int | None = None
    max_hub_bytes_per_s: int | None = None
    max_peer_bytes_per_s: int | None = None


class Limits(msgspec.Struct, frozen=True):
    """A node's storage settings. `quota_bytes` None: only the disk limits."""

    quota_bytes: int | None
    headroom_bytes: int
    eviction_policy: EvictionPolicy = "manual"
    partial_retention_s: int = 7 * 86400
    """How long the bytes of an abandoned download are kept."""
    read_only_roots: tuple[str, ...] = ()
    roots: tuple[str, ...] = ()
    """Volumes, as configured."""
    transfer: Rates = Rates()


class Shortfall(msgspec.Struct, frozen=True):
    """Bytes that must be freed before new ones fit: for the quota, and for the disk."""

    quota_bytes: int
    disk_bytes: int

    @property
    def need_bytes(self) -> int:
        """Bytes to free to meet both."""
        return max(self.quota_bytes, self.disk_bytes)


class Admission(msgspec.Struct, frozen=True):
    """An approval: which blobs are present, and which are missing (new or already arriving)."""

    present: list[str]
    missing: list[str]
    needed_bytes: int
    roots: dict[str, str] = {}
    """The volume ("" for the store) of each missing blob."""


class Wanted(msgspec.Struct, frozen=True):
    """What new blobs need of quota and disks, in bytes by blob. `fixed`: blobs that can go to one volume only."""

    blobs: Mapping[str, int]
    """Disk bytes that each needs: less than its size where good leaves of it are in quarantine."""
    fixed: Mapping[str, str]
    needed_bytes: int
    """Bytes needed of the quota."""

    def lacking(self, ledger: Ledger, limits: Limits, spaces: Sequence[Space]) -> Shortfall:
        """Return what must be freed before they fit. A demand of nothing lacks nothing, however full the disk is."""
        if self.needed_bytes <= 0:
            return Shortfall(0, 0)
        disk = lacking_bytes(self.blobs, rooms_of(spaces, limits), self.fixed)
        return Shortfall(_over_quota(self.needed_bytes, ledger, limits), disk)

    def met_by(self, ledger: Ledger, limits: Limits, spaces: Sequence[Space]) -> Callable[[Mapping[str, int]], bool]:
        """Return a predicate: whether they fit once so many bytes are freed, by volume."""
        quota, capacity = _over_quota(self.needed_bytes, ledger, limits), rooms_of(spaces, limits)

        def met(freed: Mapping[str, int]) -> bool:
            if self.needed_bytes <= 0:
                return True
            after = {volume_id: free_bytes + freed.get(volume_id, 0) for volume_id, free_bytes in capacity.items()}
            return sum(freed.values()) >= quota and spread(self.blobs, after, self.fixed) is not None

        return met


def check_manifest(manifest: Manifest) -> None:
    """Check every name and size of a foreign manifest, once, at the edge (I10). Raises BadName, BadInput."""
    if ModelRef.parse(manifest.repo).repo != manifest.repo:
        raise BadName(f"{manifest.repo[:200]!r} is not a model repository: expected org/name")
    check_commit(manifest.commit)
    for revision in manifest.revisions:
        ModelRef.parse(f"{manifest.repo}@{revision}")
    sizes: dict[str, int] = {}
    paths: set[str] = set()
    for f in manifest.files:
        check_file_path(f.path)
        check_blob(f.blob)
        if f.sha256.startswith(_GIT):
            raise BadName(f"{f.sha256!r}, given for {f.path}, is not a sha256")
        if f.path in paths:
            raise BadInput(f"the manifest of {manifest.model} lists {f.path} twice")
        if f.size_bytes < 0 or sizes.setdefault(f.blob, f.size_bytes) != f.size_bytes:
            raise BadInput(f"the manifest of {manifest.model} gives {f.path} an impossible size: {f.size_bytes}")
        paths.add(f.path)
    for path in paths:
        segments = path.split("/")
        for end in range(1, len(segments)):
            if (parent := "/".join(segments[:end])) in paths:
                raise BadInput(f"in the manifest of {manifest.model} {parent} is both a file and a directory")


def _over_quota(needed_bytes: int, ledger: Ledger, limits: Limits) -> int:
    if limits.quota_bytes is None:
        return 0
    return max(needed_bytes - (limits.quota_bytes - ledger.used_bytes - ledger.reserved_bytes), 0)


def asked_leaves(manifest: Manifest, asked: Mapping[str, Iterable[Sequence[int]]], ledger: Ledger) -> dict[str, int]:
    """Return the requested leaves by blob, for blobs not requested whole; the model's shard's own leaves included.

    Raises BadInput for blobs and leaves that are not the manifest's.
    """
    sizes, part = manifest.blob_sizes, ledger.parts.get(manifest.model)
    leaves_by_blob: dict[str, int] = {}
    for blob, ranges in asked.items():
        if blob not in sizes:
            raise BadInput(f"the request names leaves of {blob[:80]!r}, which is not a blob of {manifest.model}")
        leaves_by_blob[blob] = leafset.of_ranges(ranges, sizes[blob])
        if part is not None and blob in part.leaves:
            leaves_by_blob[blob] |= part.leaves[blob]
    return leaves_by_blob


def promised_leaves(model: str, asked: Mapping[str, int], ledger: Ledger) -> dict[str, int]:
    """Return the leaves to reserve by blob. Blobs that are not in the result are reserved whole."""
    result = dict(asked)
    for blob in asked:
        partial = ledger.partials.get(blob)
        arrives_whole = partial is not None and model in partial.models and model not in partial.leaves
        if arrives_whole and model not in ledger.ended:
            del result[blob]  # another download of the model fetches all of it
        elif partial is None and asked[blob] and blob in ledger.repairable:
            del result[blob]  # it comes back from quarantine with its own good leaves, which may be others
    return result


def rooms_of(spaces: Iterable[Space], limits: Limits) -> dict[str, int]:
    """Return the bytes each volume can take, the store first."""
    return {s.further: s.to_give(limits.headroom_bytes) for s in spaces}


def store_space(ledger: Ledger, free_bytes: int) -> Space:
    """Return the free space of a store without volumes."""
    return Space("", "the store", free_bytes, ledger.in_flight_by_root[""])


def wanted(manifest: Manifest, ledger: Ledger, leaves: Mapping[str, int] | None = None) -> Wanted:
    """Return what a manifest's missing blobs need; `leaves` names those needed in part."""
    wanted_leaves = leaves or {}
    sizes = {
        b: size for b, size in manifest.blob_sizes.items() if ledger.bytes_of(b) != size and wanted_leaves.get(b) != 0
    }
    needed = {b: ledger.needed_bytes(b, size, manifest.model, wanted_leaves.get(b)) for b, size in sizes.items()}
    quarantined = {b: ledger.repairable[b] for b in sizes if b in ledger.repairable and b not in ledger.partials}
    fixed_blobs = {*ledger.partials, *ledger.unproven, *quarantined}
    return Wanted(
        blobs={b: max(n - quarantined.get(b, 0), 0) for b, n in needed.items()},
        fixed={b: ledger.where.get(b, "") for b in sizes if b in fixed_blobs},
        needed_bytes=sum(needed.values()),
    )


def admit(
    manifest: Manifest,
    ledger: Ledger,
    limits: Limits,
    free_bytes: int,
    spaces: Sequence[Space] = (),
    leaves: Mapping[str, int] | None = None,
) -> Admission:
    """Approve a manifest's missing blobs, of some only `leaves`. Raises QuotaExceeded with the figures (I3).

    The needed bytes are the distinct bytes neither present nor reserved. They must fit the quota beside all that is
    present and reserved, and each blob must fit its disk beside the headroom and all that is still to be written
    there. `free_bytes` is the store's; `spaces`, where there are volumes, lists all, the store first. A blob whose
    size changed on disk is missing: a new one replaces it. Raises BadInput for a size that contradicts an existing
    reservation.
    """
    leaves = leaves or {}
    sizes = {b: size for b, size in manifest.blob_sizes.items() if leaves.get(b) != 0}
    spaces = spaces or [store_space(ledger, free_bytes)]
    present = [b for b in sizes if ledger.bytes_of(b) == sizes[b]]
    missing = [b for b in sizes if ledger.bytes_of(b) != sizes[b]]
    for blob in missing:
        partial = ledger.partials.get(blob)
        if partial is not None and partial.size_bytes != sizes[blob]:
            raise BadInput(
                f"{manifest.model} gives blob {blob[:16]}… {sizes[blob]} bytes, but another download reserved it "
                f"with {partial.size_bytes}: one manifest is wrong; cancel the other download to try this one"
            )
    demand = wanted(manifest, ledger, leaves)
    needed, lacking = demand.needed_bytes, demand.lacking(ledger, limits, spaces)
    if lacking.need_bytes:
        raise _refused(manifest, demand, lacking, ledger, limits, free_bytes, spaces)
    # A demand of nothing is admitted however full the disks are.
    volumes = spread(demand.blobs, rooms_of(spaces, limits), demand.fixed) or {}
    return Admission(
        present=present, missing=missing, needed_bytes=needed, roots={b: volumes.get(b, "") for b in missing}
    )


def _refused(
    manifest: Manifest,
    demand: Wanted,
    lacking: Shortfall,
    ledger: Ledger,
    limits: Limits,
    free_bytes: int,
    spaces: Sequence[Space],
) -> QuotaExceeded:
    """Build the refusal with its figures. They cost a pass over the whole ledger, which an approval does not need."""
    needed = demand.needed_bytes
    figures: dict[str, Any] = {
        "needed_bytes": needed,
        "free_bytes": free_bytes,
        "headroom_bytes": limits.headroom_bytes,
        "in_flight_bytes": ledger.in_flight_bytes,
        "quota_bytes": limits.quota_bytes,
        "used_bytes": ledger.used_bytes,
        "reserved_bytes": ledger.reserved_bytes,
        "shortfall_bytes": lacking.need_bytes,
    }
    if len(spaces) > 1:
        figures["roots"] = [
            {
                "path": s.path,
                "free_bytes": s.free_bytes,
                "in_flight_bytes": s.in_flight_bytes,
                "room_bytes": max(s.to_give(limits.headroom_bytes), 0),
            }
            for s in spaces
        ]
    if lacking.quota_bytes:
        return QuotaExceeded(
            f"{manifest.repo} needs {human(needed)}; the quota of {human(limits.quota_bytes or 0)} has "
            f"{human(max(needed - lacking.quota_bytes, 0))} left ({human(ledger.used_bytes)} used, "
            f"{human(ledger.reserved_bytes)} reserved): remove a model with `shoal rm`, or raise the quota with "
            "`shoal storage set --max-storage`",
            **figures,
        )
    if len(spaces) > 1:
        return QuotaExceeded(
            f"{manifest.repo} needs {human(needed)}, its largest file {human(max(demand.blobs.values()))}; "
            f"{_describe_available(spaces, limits)}, each beside {human(limits.headroom_bytes)} of headroom: free "
            "some space, or remove a model with `shoal rm`",
            **figures,
        )
    return QuotaExceeded(
        f"{manifest.repo} needs {human(needed)}; the disk has {human(max(needed - lacking.disk_bytes, 0))} available "
        f"({human(free_bytes)} free, {human(limits.headroom_bytes)} headroom, "
        f"{human(ledger.in_flight_bytes)} reserved): free some space, or remove a model with `shoal rm`",
        **figures,
    )


def _describe_available(spaces: Iterable[Space], limits: Limits) -> str:
    return ", ".join(f"{s.path} has {human(max(s.to_give(limits.headroom_bytes), 0))} available" for s in spaces)


def referenced(ledger: Ledger, leaving: Iterable[str] = ()) -> set[str]:
    """Return the blobs that a manifest, a running fetch or a lease needs. The `ignored` models do not count."""
    gone = set(leaving)
    needed = {b for model, m in ledger.on_disk.items() if model not in gone for b in m.blob_sizes}
    for model, blobs in ledger.promised.items():
        if model not in gone:
            needed |= blobs
    for lease in ledger.leases.values():  # readers, whatever happens to the model's manifest
        needed |= lease.blobs
    for blob, partial in ledger.partials.items():
        if partial.models - gone:
            needed.add(blob)
    return needed


def blobs_of(model: str, ledger: Ledger) -> set[str]:
    """Return every blob, present or arriving, that is here for a model."""
    manifest = ledger.on_disk.get(model) or ledger.leaving.get(model)
    blobs = set(manifest.blob_sizes) if manifest else set()
    blobs |= ledger.promised.get(model, set())
    return blobs | {b for b, p in ledger.partials.items() if model in p.models}


def freed_by(model: str, ledger: Ledger) -> list[str]:
    """Return the blobs that only this model needs: those that deleting it deletes."""
    return sorted(blobs_of(model, ledger) - referenced(ledger, leaving=[model]))


def paused_bytes(ledger: Ledger) -> dict[str, int]:
    """Return the bytes held for each paused model: its reservations, and present blobs that only it needs."""
    result = {}
    for model in sorted(ledger.paused & ledger.on_its_way):
        present_bytes = sum(ledger.blobs.get(blob, 0) for blob in freed_by(model, ledger))
        partials = [p.wanted_by_only(model) for p in ledger.partials.values() if model in p.models]
        result[model] = present_bytes + sum(p.promised_bytes for p in partials)
    return result


def left_behind(deleted: Manifest, ledger: Ledger) -> list[str]:
    """Return the blobs of a model that nothing else needs, after a crash interrupted its deletion."""
    return sorted({b for b in deleted.blob_sizes if b in ledger.blobs} - referenced(ledger))


def arriving(repo: str, revision: str, ledger: Ledger) -> list[str]:
    """Return the models of a repo (`org/name@commit`) that have a reservation and are not complete.

    The branch they were requested under is not known here: a revision matches by commit only.
    """
    wanted = {m for m in ledger.on_its_way if m.rpartition("@")[0] == repo and m not in ledger.manifests}
    return sorted(m for m in wanted if revision in ("", m.rpartition("@")[2]))


def matching(repo: str, revision: str, manifests: Iterable[Manifest]) -> list[Manifest]:
    """Return the manifests that `org/name` (all commits) or `org/name@revision` names."""
    matches = [m for m in manifests if m.repo == repo]
    if revision:
        matches = [m for m in matches if m.commit == revision or revision in m.revisions]
    return sorted(matches, key=lambda m: m.commit)


def part_for(ref: ModelRef, layers: Sequence[int], ledger: Ledger) -> Part | None:
    """Return the shard that suffices for a stage with these layers; None if there is none, or for no layers."""
    if not layers:
        return None
    check_layers(layers)
    candidates = matching(ref.repo, ref.revision, (p.manifest for p in ledger.parts.values()))
    sufficient = [p for m in candidates if covers((p := ledger.parts[m.model]).layers, layers)]
    return sufficient[-1] if sufficient else None


def is_offered(manifest: Manifest, ledger: Ledger) -> bool:
    """Whether a library offers exactly this model, under all of its names."""
    library_model = ledger.offered.get(manifest.model)
    if library_model is None or not set(manifest.revisions) <= {*library_model.manifest.revisions, manifest.commit}:
        return False
    return {f.path: f.sha256 for f in manifest.files} == {f.path: f.sha256 for f in library_model.manifest.files}


def human(size_bytes: int) -> str:
    """Format bytes for people, in decimal units as disks are sold."""
    value = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}" if unit != "B" else f"{size_bytes} B"
        value /= 1000
    return f"{value:.4g} TB"
