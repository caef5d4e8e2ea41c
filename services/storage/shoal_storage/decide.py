"""What storage decides, apart from doing it: admission, references, what a deletion takes with it. Pure."""

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
"""The largest blocks of common file systems: what a file's end takes beyond its bytes is less, and not counted."""


class Partial(msgspec.Struct):
    """A blob on its way in: its size, bytes allocated on the disk so far, and the models it is for."""

    size_bytes: int
    allocated_bytes: int = 0
    models: set[str] = msgspec.field(default_factory=set)
    leaves: dict[str, int] = msgspec.field(default_factory=dict)
    """Of those models that want it in part, the leaves that they want. The others want all of it."""
    here: int = 0
    """Leaves that are durable, as of when it was last reserved; of use only where nobody wants all of it."""

    @property
    def _in_part(self) -> bool:
        """Whether nobody wants all of it."""
        return bool(self.leaves) and bool(self.models) and self.models <= self.leaves.keys()

    @property
    def promised_leaves(self) -> int:
        """The leaves that may come to be here."""
        if not self._in_part:
            return leafset.whole(self.size_bytes)
        found = self.here
        for model in self.models:
            found |= self.leaves[model]
        return found

    @property
    def promised_bytes(self) -> int:
        """Bytes that it may come to take; never less than it takes already, by whole blocks of the file system."""
        # Asked of every partial at every admission: a set of leaves is made only where it is needed.
        promised = leafset.size_of(self.promised_leaves, self.size_bytes) if self._in_part else self.size_bytes
        return promised if self.allocated_bytes < promised + _BLOCK_BYTES else self.allocated_bytes

    def wanted_by(self, model: str, leaves: int | None) -> Partial:
        """The same, once this model wants these leaves of it, or all."""
        others = {m: x for m, x in self.leaves.items() if m != model}
        its = others if leaves is None else {**others, model: leaves}
        return msgspec.structs.replace(self, models={*self.models, model}, leaves=its)

    def wanted_by_only(self, model: str) -> Partial:
        """The same, if only this one of its models wanted it."""
        return msgspec.structs.replace(self, models={model})

    def without(self, model: str) -> Partial:
        """The same, once this model wants nothing of it."""
        rest = {m: x for m, x in self.leaves.items() if m != model}
        return msgspec.structs.replace(self, models=self.models - {model}, leaves=rest)


class Part(msgspec.Struct, frozen=True):
    """What is here of a model that is not here whole: enough for stages with these layers, `[first, last)` each."""

    manifest: Manifest
    layers: list[list[int]]
    leaves: dict[str, int]
    """Of the blobs that are not needed whole, the leaves that are; none of a blob that is not needed."""

    @property
    def size_bytes(self) -> int:
        """Bytes of what it needs."""
        return sum(
            leafset.size_of(self.leaves[b], size) if b in self.leaves else size
            for b, size in self.manifest.blob_sizes.items()
        )


class Stamp(msgspec.Struct, frozen=True):
    """What the stat of a blob's file says: another stamp is another file, or another content."""

    size_bytes: int
    mtime_ns: int
    inode: int
    proven: bool = False
    """Whether the file shows that it was hashed under its name (`proof.py`)."""
    further: str = ""
    """The further root that it is in, by its id; "" for the store."""

    def same_file(self, other: Stamp) -> bool:
        """Whether nothing was written in between."""
        mine = self.size_bytes, self.mtime_ns, self.inode, self.further
        return mine == (other.size_bytes, other.mtime_ns, other.inode, other.further)


class Unknown(msgspec.Struct, frozen=True):
    """Files in the store that are none of ours: counted, never deleted. `paths`: the first, below the store."""

    count: int = 0
    size_bytes: int = 0
    paths: tuple[str, ...] = ()


class Ledger(msgspec.Struct):
    """What the disk holds, as known. The disk is the truth; this is rebuilt from it at start, and follows it."""

    blobs: dict[str, int] = msgspec.field(default_factory=dict)
    """Bytes of each blob, by sha256."""
    where: dict[str, str] = msgspec.field(default_factory=dict)
    """The further root, by its id, that a blob is in, arrives in or was set aside in; the others are in the store."""
    doubles: dict[str, dict[str, int]] = msgspec.field(default_factory=dict)
    """Blobs that are here once more: bytes by the root ("" for the store) of each file that is one too many."""
    unproven: dict[str, Stamp] = msgspec.field(default_factory=dict)
    """Files with a blob's name that somebody put there: they take room, and are no blobs before they are hashed."""
    wrong: dict[str, Stamp] = msgspec.field(default_factory=dict)
    """Those of them that did not hash to their name, as they were then."""
    unknown: Unknown = msgspec.field(default_factory=Unknown)
    away: bool = False
    """Whether the store is not where it was: an unmounted disk has lost nothing, and offers nothing."""
    partials: dict[str, Partial] = msgspec.field(default_factory=dict)
    manifests: dict[str, Manifest] = msgspec.field(default_factory=dict)
    """Manifests of whole models, by `org/name@commit`."""
    broken: dict[str, Manifest] = msgspec.field(default_factory=dict)
    """Manifests of models that have lost blobs: never announced; their other blobs wait for a repair or an `rm`."""
    leaving: dict[str, Manifest] = msgspec.field(default_factory=dict)
    """Manifests, in `tombs/`, of models whose deletion the disk refused in the middle: not here, and not all gone."""
    promised: dict[str, set[str]] = msgspec.field(default_factory=dict)
    """Blobs, present or arriving, that a fetch under way counts on, by `org/name@commit`."""
    quarantined: set[str] = msgspec.field(default_factory=set)
    """Blobs that were set aside because they were not what their name says, and are wanted back."""
    repairable: dict[str, int] = msgspec.field(default_factory=dict)
    """Of those, the ones that are repaired by leaf: bytes on the disk that are used again, by sha256."""
    parts: dict[str, Part] = msgspec.field(default_factory=dict)
    """Models of which what some stages need is here, verified, by `org/name@commit`. Their promises stand."""
    git: dict[str, str] = msgspec.field(default_factory=dict)
    """What blobs named by git's sha1 became when they were committed: `git-<sha1>` to sha256."""
    leases: dict[str, Lease] = msgspec.field(default_factory=dict)
    """Leases that live, by id."""
    pinned: set[str] = msgspec.field(default_factory=set)
    """Models (`org/name@commit`) that people keep."""
    last_uses: dict[str, float] = msgspec.field(default_factory=dict)
    """Seconds since 1970 of each model's last use; of one that never ran, when it came in."""
    wanted_s: dict[str, float] = msgspec.field(default_factory=dict)
    """Seconds since 1970 of when each model on its way was last known to be wanted."""
    ended: set[str] = msgspec.field(default_factory=set)
    """Models on their way whose promise has ended: nobody wants them any more, and their bytes are still here."""
    paused: set[str] = msgspec.field(default_factory=set)
    """Models on their way that people have paused: wanted, and not fetched."""
    adopted: dict[str, Adopted] = msgspec.field(default_factory=dict)
    """Models of read-only roots, by `org/name@commit`. Present, and nothing of this store: no bytes of the quota,
    never garbage, never a victim. Changed by `adopt` alone."""
    adopted_blobs: dict[str, File] = msgspec.field(default_factory=dict)
    """Their blobs, each with one file that has its bytes, by sha256."""
    adopted_git: dict[str, str] = msgspec.field(default_factory=dict)
    """As `git`, of adopted blobs."""

    @property
    def on_disk(self) -> dict[str, Manifest]:
        """Every manifest in the store, of whole models and of broken ones."""
        return {**self.manifests, **self.broken}

    @property
    def here(self) -> dict[str, Manifest]:
        """What people can keep, use and remove: the models in the store, and those of which a part is."""
        return {**{m: part.manifest for m, part in self.parts.items()}, **self.on_disk}

    def at_rest(self, model: str) -> bool:
        """Whether a part of a model is here and nothing more of it is promised."""
        part = self.parts.get(model)
        return part is not None and all(
            p.leaves.get(model) == part.leaves.get(b, -1) for b, p in self.partials.items() if model in p.models
        )

    @property
    def offered(self) -> dict[str, Adopted]:
        """The adopted models, those aside that are in the store too."""
        return {m: a for m, a in self.adopted.items() if m not in self.manifests and m not in self.broken}

    @property
    def whole(self) -> dict[str, Manifest]:
        """The manifests of every model that the cluster may have from here."""
        return {**{m: a.manifest for m, a in self.offered.items()}, **self.manifests}

    def bytes_of(self, blob: str) -> int | None:
        """Bytes of a blob that is here, in the store or adopted; None when it is not."""
        found = self.blobs.get(blob)
        if found is None and blob in self.adopted_blobs:
            found = self.adopted_blobs[blob].seen.size_bytes
        return found

    def drop(self, blob: str) -> int:
        """A blob was removed, with every copy of it. Returns its bytes."""
        self.where.pop(blob, None)
        return self.blobs.pop(blob, 0) + sum(self.doubles.pop(blob, {}).values())

    def forget_places(self) -> None:
        """Where a blob was that is here no more is of no use."""
        known = {*self.blobs, *self.partials, *self.unproven, *self.quarantined}
        for blob in [b for b, further in self.where.items() if not further or b not in known]:
            del self.where[blob]

    def adopt(self, models: Mapping[str, Adopted]) -> None:
        """From now on these models are adopted, and no others."""
        self.adopted, self.adopted_blobs, self.adopted_git = dict(models), {}, {}
        for model in sorted(models):
            adopted = models[model]
            for f in adopted.manifest.files:
                self.adopted_blobs.setdefault(f.sha256, adopted.files[f.path])
            self.adopted_git.update(adopted.git)

    @property
    def used_bytes(self) -> int:
        """Bytes of all blobs, of the leaves that parts need, and of what has a blob's name and is not proven."""
        doubled = sum(sum(copies.values()) for copies in self.doubles.values())
        unproven_bytes = sum(stamp.size_bytes for stamp in self.unproven.values())
        return sum(self.blobs.values()) + self.part_bytes + unproven_bytes + doubled

    @property
    def part_bytes(self) -> int:
        """Bytes of the leaves of partials that parts need: present and verified, those of two parts once."""
        return sum(self.part_bytes_of(b, p) for b, p in self.partials.items()) if self.parts else 0

    def part_bytes_of(self, blob: str, partial: Partial) -> int:
        """The same, of one partial."""
        return leafset.size_of(self.part_leaves(blob), partial.size_bytes)

    def part_leaves(self, blob: str) -> int:
        """The leaves of a blob that parts need: verified, unless the blob is here whole."""
        found = 0
        for part in list(self.parts.values()):  # what is told of a root is worked out in a thread
            found |= part.leaves.get(blob, 0)
        return found

    @property
    def reserved_bytes(self) -> int:
        """Bytes promised to what is arriving, and those that ended promises have left; without what is used."""
        return sum(self.promised_bytes(p) for p in self.partials.values()) - self.part_bytes

    @property
    def in_flight_bytes(self) -> int:
        """Bytes promised and not yet allocated: they will still shrink what the file system calls free."""
        return sum(self.in_flight_by_root.values())

    @property
    def in_flight_by_root(self) -> Counter[str]:
        """The same, by further root; "" for the store."""
        found = Counter[str]()
        for blob, p in self.partials.items():
            found[self.where.get(blob, "")] += max(self.promised_bytes(p) - p.allocated_bytes, 0)
        return found

    @property
    def on_its_way(self) -> set[str]:
        """Models of which something is reserved, or was."""
        return {*self.promised, *(m for p in self.partials.values() for m in p.models)}

    def promises(self, partial: Partial) -> bool:
        """Whether a partial may still grow: the promise to one of its models stands."""
        return not partial.models or not partial.models <= self.ended

    def promised_bytes(self, partial: Partial, standing: str = "") -> int:
        """Bytes that a partial may come to take by the promises that stand, that to `standing` among them."""
        left = partial.models - (self.ended - {standing})
        if partial.models and not left:
            return partial.allocated_bytes
        only = partial if left == partial.models else msgspec.structs.replace(partial, models=left)
        return only.promised_bytes

    def needed_bytes(self, blob: str, size_bytes: int, model: str = "", leaves: int | None = None) -> int:
        """What promising a model a blob that is not here, or leaves of it, adds to what is promised already."""
        partial = self.partials.get(blob)
        if partial is None:
            return size_bytes if leaves is None else leafset.size_of(leaves, size_bytes)
        after = self.promised_bytes(partial.wanted_by(model, leaves), standing=model)
        return max(0, after - self.promised_bytes(partial))


class Rates(msgspec.Struct, frozen=True):
    """How fast a node moves weights. None: as fast as it goes. Told to fetcher and fileserver, who keep to them."""

    max_upload_bytes_per_s: int | None = None
    max_hub_bytes_per_s: int | None = None
    max_peer_bytes_per_s: int | None = None


class Limits(msgspec.Struct, frozen=True):
    """A node's settings. `quota_bytes` None: only the disk limits."""

    quota_bytes: int | None
    headroom_bytes: int
    eviction_policy: EvictionPolicy = "manual"
    partial_retention_s: int = 7 * 86400
    """How long bytes of a download that nobody wants any more are kept."""
    read_only_roots: tuple[str, ...] = ()
    roots: tuple[str, ...] = ()
    """Further roots, as they were given."""
    transfer: Rates = Rates()


class Shortfall(msgspec.Struct, frozen=True):
    """Bytes that would have to go before others may come in: for the quota, and for the disk."""

    quota_bytes: int
    disk_bytes: int

    @property
    def need_bytes(self) -> int:
        """What has to be freed to meet both."""
        return max(self.quota_bytes, self.disk_bytes)


class Admission(msgspec.Struct, frozen=True):
    """An approval: which blobs are here, which are to come (new or already on their way)."""

    present: list[str]
    missing: list[str]
    needed_bytes: int
    roots: dict[str, str] = {}
    """The root ("" for the store) of each blob that is to come and has none yet."""


class Wanted(msgspec.Struct, frozen=True):
    """What new blobs ask of quota and disks. Bytes by blob; `fixed`: those that can be in one root only."""

    blobs: Mapping[str, int]
    """What each needs of its disk: less than its size where some of it is there, in quarantine."""
    fixed: Mapping[str, str]
    needed_bytes: int
    """Of the quota."""

    def lacking(self, ledger: Ledger, limits: Limits, spaces: Sequence[Space]) -> Shortfall:
        """What has to go before they may come in. Nothing needed lacks nothing, however full it is."""
        if self.needed_bytes <= 0:
            return Shortfall(0, 0)
        disk = lacking_bytes(self.blobs, rooms_of(spaces, limits), self.fixed)
        return Shortfall(_over_quota(self.needed_bytes, ledger, limits), disk)

    def met_by(self, ledger: Ledger, limits: Limits, spaces: Sequence[Space]) -> Callable[[Mapping[str, int]], bool]:
        """Whether they may come in once so many bytes were freed, by root."""
        quota, rooms = _over_quota(self.needed_bytes, ledger, limits), rooms_of(spaces, limits)

        def met(freed: Mapping[str, int]) -> bool:
            if self.needed_bytes <= 0:
                return True
            then = {further: room + freed.get(further, 0) for further, room in rooms.items()}
            return sum(freed.values()) >= quota and spread(self.blobs, then, self.fixed) is not None

        return met


def check_manifest(manifest: Manifest) -> None:
    """Check every name and size of a manifest from outside, once, at the edge (I10). Raises BadName, BadInput."""
    if ModelRef.parse(manifest.repo).repo != manifest.repo:
        raise BadName(f"{manifest.repo[:200]!r} is not a model's repository: org/name is expected")
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
            raise BadInput(f"the manifest of {manifest.model} has {f.path} twice")
        if f.size_bytes < 0 or sizes.setdefault(f.blob, f.size_bytes) != f.size_bytes:
            raise BadInput(f"the manifest of {manifest.model} gives {f.path} a size that cannot be: {f.size_bytes}")
        paths.add(f.path)
    for path in paths:
        parts = path.split("/")
        for end in range(1, len(parts)):
            if (above := "/".join(parts[:end])) in paths:
                raise BadInput(f"in the manifest of {manifest.model} {above} is both a file and a directory")


def _over_quota(needed_bytes: int, ledger: Ledger, limits: Limits) -> int:
    if limits.quota_bytes is None:
        return 0
    return max(needed_bytes - (limits.quota_bytes - ledger.used_bytes - ledger.reserved_bytes), 0)


def asked_leaves(manifest: Manifest, asked: Mapping[str, Iterable[Sequence[int]]], ledger: Ledger) -> dict[str, int]:
    """Of which blobs only which leaves are asked for, those that are here of the model as a part among them.

    Raises BadInput for blobs and leaves that are not the manifest's.
    """
    sizes, part = manifest.blob_sizes, ledger.parts.get(manifest.model)
    found: dict[str, int] = {}
    for blob, ranges in asked.items():
        if blob not in sizes:
            raise BadInput(f"leaves of {blob[:80]!r} were asked for, which is no blob of {manifest.model}")
        found[blob] = leafset.of_ranges(ranges, sizes[blob])
        if part is not None and blob in part.leaves:
            found[blob] |= part.leaves[blob]
    return found


def promised_leaves(model: str, asked: Mapping[str, int], ledger: Ledger) -> dict[str, int]:
    """Of which blobs only these leaves are promised to a model now that they are asked for: the others are, whole."""
    found = dict(asked)
    for blob in asked:
        partial = ledger.partials.get(blob)
        arrives_whole = partial is not None and model in partial.models and model not in partial.leaves
        if arrives_whole and model not in ledger.ended:
            del found[blob]  # another download of the model brings all of it
        elif partial is None and asked[blob] and blob in ledger.repairable:
            del found[blob]  # it comes back with the good leaves that it has, which may be others
    return found


def rooms_of(spaces: Iterable[Space], limits: Limits) -> dict[str, int]:
    """What each root has to give, the store first."""
    return {s.further: s.to_give(limits.headroom_bytes) for s in spaces}


def store_space(ledger: Ledger, free_bytes: int) -> Space:
    """What a store without further roots has."""
    return Space("", "the store", free_bytes, ledger.in_flight_by_root[""])


def wanted(manifest: Manifest, ledger: Ledger, leaves: Mapping[str, int] | None = None) -> Wanted:
    """What the blobs of a manifest that are not here ask for, or of some of them only `leaves`."""
    its = leaves or {}
    sizes = {b: size for b, size in manifest.blob_sizes.items() if ledger.bytes_of(b) != size and its.get(b) != 0}
    needed = {b: ledger.needed_bytes(b, size, manifest.model, its.get(b)) for b, size in sizes.items()}
    there = {b: ledger.repairable[b] for b in sizes if b in ledger.repairable and b not in ledger.partials}
    bound = {*ledger.partials, *ledger.unproven, *there}
    return Wanted(
        blobs={b: max(n - there.get(b, 0), 0) for b, n in needed.items()},
        fixed={b: ledger.where.get(b, "") for b in sizes if b in bound},
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
    """Approve a manifest's missing blobs, of some only `leaves`, or raise QuotaExceeded with the figures (I3).

    Needed are the distinct bytes neither present nor promised. They must fit the quota beside all that is present
    and promised, and each blob the disk that it comes to, beside the headroom and all that is still to be written
    there. `free_bytes` are those of the store; `spaces`, where there are further roots, has all, the store first.
    A blob whose size has changed under us is missing: a new one will take its place. Raises BadInput for a size that
    contradicts what was promised already.
    """
    leaves = leaves or {}
    sizes = {b: size for b, size in manifest.blob_sizes.items() if leaves.get(b) != 0}
    spaces = spaces or [store_space(ledger, free_bytes)]
    present = [b for b in sizes if ledger.bytes_of(b) == sizes[b]]
    missing = [b for b in sizes if ledger.bytes_of(b) != sizes[b]]
    for blob in missing:
        promised = ledger.partials.get(blob)
        if promised is not None and promised.size_bytes != sizes[blob]:
            raise BadInput(
                f"{manifest.model} gives blob {blob[:16]}… {sizes[blob]} bytes, and it is arriving with "
                f"{promised.size_bytes}: one of the two manifests is wrong; cancel the other download to try this one"
            )
    asked = wanted(manifest, ledger, leaves)
    needed, lacking = asked.needed_bytes, asked.lacking(ledger, limits, spaces)
    if lacking.need_bytes:
        raise _refused(manifest, asked, lacking, ledger, limits, free_bytes, spaces)
    # What needs nothing is taken however full the disks are.
    roots = spread(asked.blobs, rooms_of(spaces, limits), asked.fixed) or {}
    return Admission(
        present=present, missing=missing, needed_bytes=needed, roots={b: roots.get(b, "") for b in missing}
    )


def _refused(
    manifest: Manifest,
    asked: Wanted,
    lacking: Shortfall,
    ledger: Ledger,
    limits: Limits,
    free_bytes: int,
    spaces: Sequence[Space],
) -> QuotaExceeded:
    """The refusal and its figures, which take a look at everything that is here: an approval needs none of them."""
    needed = asked.needed_bytes
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
            f"{manifest.repo} needs {human(needed)} and the quota of {human(limits.quota_bytes or 0)} has "
            f"{human(max(needed - lacking.quota_bytes, 0))} left ({human(ledger.used_bytes)} used, "
            f"{human(ledger.reserved_bytes)} reserved): remove a model with `shoal rm`, or raise max_storage_bytes",
            **figures,
        )
    if len(spaces) > 1:
        return QuotaExceeded(
            f"{manifest.repo} needs {human(needed)}, its largest file {human(max(asked.blobs.values()))}, and "
            f"{_to_give(spaces, limits)}, each beside the {human(limits.headroom_bytes)} kept free there: free some "
            "space, or remove a model with `shoal rm`",
            **figures,
        )
    return QuotaExceeded(
        f"{manifest.repo} needs {human(needed)} and the disk has {human(max(needed - lacking.disk_bytes, 0))} "
        f"to give ({human(free_bytes)} free, {human(limits.headroom_bytes)} kept free, "
        f"{human(ledger.in_flight_bytes)} promised): free some space, or remove a model with `shoal rm`",
        **figures,
    )


def _to_give(spaces: Iterable[Space], limits: Limits) -> str:
    return ", ".join(f"{s.path} has {human(max(s.to_give(limits.headroom_bytes), 0))} to give" for s in spaces)


def referenced(ledger: Ledger, leaving: Iterable[str] = ()) -> set[str]:
    """Blobs that a manifest, a fetch under way or a lease needs, not counting the models in `leaving`."""
    gone = set(leaving)
    needed = {b for model, m in ledger.on_disk.items() if model not in gone for b in m.blob_sizes}
    for model, blobs in ledger.promised.items():
        if model not in gone:
            needed |= blobs
    for lease in ledger.leases.values():  # whatever its model's manifest does: somebody reads them
        needed |= lease.blobs
    for blob, partial in ledger.partials.items():
        if partial.models - gone:
            needed.add(blob)
    return needed


def blobs_of(model: str, ledger: Ledger) -> set[str]:
    """Every blob, present or arriving, that is here for a model."""
    manifest = ledger.on_disk.get(model) or ledger.leaving.get(model)
    its = set(manifest.blob_sizes) if manifest else set()
    its |= ledger.promised.get(model, set())
    return its | {b for b, p in ledger.partials.items() if model in p.models}


def freed_by(model: str, ledger: Ledger) -> list[str]:
    """Blobs of a model that nothing else needs: what removing it removes."""
    return sorted(blobs_of(model, ledger) - referenced(ledger, leaving=[model]))


def paused_bytes(ledger: Ledger) -> dict[str, int]:
    """Paused models, and what is kept for each: all that is promised to it, and blobs that nothing else needs."""
    found = {}
    for model in sorted(ledger.paused & ledger.on_its_way):
        here = sum(ledger.blobs.get(blob, 0) for blob in freed_by(model, ledger))
        mine = [p.wanted_by_only(model) for p in ledger.partials.values() if model in p.models]
        found[model] = here + sum(p.promised_bytes for p in mine)
    return found


def left_behind(deleted: Manifest, ledger: Ledger) -> list[str]:
    """Blobs of a model whose deletion a crash interrupted, that nothing else needs."""
    return sorted({b for b in deleted.blob_sizes if b in ledger.blobs} - referenced(ledger))


def arriving(repo: str, revision: str, ledger: Ledger) -> list[str]:
    """Models of a repo (`org/name@commit`) of which something is reserved, whole ones aside.

    Which branch a model on its way was asked under is not known here: a revision matches by commit only.
    """
    wanted = {m for m in ledger.on_its_way if m.rpartition("@")[0] == repo and m not in ledger.manifests}
    return sorted(m for m in wanted if revision in ("", m.rpartition("@")[2]))


def matching(repo: str, revision: str, manifests: Iterable[Manifest]) -> list[Manifest]:
    """The manifests a person means by `org/name` (all commits) or `org/name@revision`."""
    found = [m for m in manifests if m.repo == repo]
    if revision:
        found = [m for m in found if m.commit == revision or revision in m.revisions]
    return sorted(found, key=lambda m: m.commit)


def part_for(ref: ModelRef, layers: Sequence[int], ledger: Ledger) -> Part | None:
    """What is here of a model, if that is enough for a stage with these layers; None for no layers."""
    if not layers:
        return None
    check_layers(layers)
    held = matching(ref.repo, ref.revision, (p.manifest for p in ledger.parts.values()))
    enough = [p for m in held if covers((p := ledger.parts[m.model]).layers, layers)]
    return enough[-1] if enough else None


def is_offered(manifest: Manifest, ledger: Ledger) -> bool:
    """Whether a read-only root offers exactly this model, under all of its names."""
    adopted = ledger.offered.get(manifest.model)
    if adopted is None or not set(manifest.revisions) <= {*adopted.manifest.revisions, manifest.commit}:
        return False
    return {f.path: f.sha256 for f in manifest.files} == {f.path: f.sha256 for f in adopted.manifest.files}


def human(size_bytes: int) -> str:
    """Bytes for people, in decimal units as disks are sold."""
    value = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}" if unit != "B" else f"{size_bytes} B"
        value /= 1000
    return f"{value:.4g} TB"
