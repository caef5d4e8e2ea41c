"""Storage's contract: commands, requests and state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shoal_common.messages import WireStruct
from shoal_common.messages.envelope import Command
from shoal_common.messages.manifest import LeafListSeal, Manifest
from shoal_common.messages.model_shape import ModelShape
from shoal_common.names import ModelId, model_id
from shoal_common.settings.fields import with_changes_of, with_values_of
from shoal_common.settings.node import PublishedSettings, StorageSettings

if TYPE_CHECKING:

    class _Published(PublishedSettings, WireStruct):
        pass

    _Changes = Command
else:
    _Published = with_values_of(PublishedSettings, WireStruct)
    _Changes = with_changes_of(StorageSettings, Command)


class LeaseState(WireStruct):
    """A lease on a model of a node."""

    id: str
    """The lease's id."""
    model: ModelId
    """`org/name@commit`."""
    holder: str
    """Who holds it, in the holder's words."""
    since_s: float
    """When it was granted."""
    pid: int = 0
    """The process that holds its lock; 0 if none does yet or the system does not say."""


class LibraryState(WireStruct):
    """A library: a read-only directory whose models a node offers in place."""

    path: str
    """The directory."""
    error: str = ""
    """Why it cannot be scanned; "" if it can."""
    model_count: int = 0
    """Models offered from it."""
    unhashed_count: int = 0
    """Models whose files are not hashed yet."""
    unhashed_bytes: int = 0
    """Size of those models."""
    rejected: dict[str, str] = {}
    """Directories that look like a model and are not offered, with the reason; at most 20."""
    rejected_count: int = 0
    """Number of all such directories."""


class VolumeState(WireStruct):
    """A volume: a directory on another disk that holds blobs of this node's models."""

    path: str
    """The directory."""
    id: str = ""
    """Id in its VERSION file; "" while unknown."""
    error: str = ""
    """Why it is not used, such as a disk that is not mounted; its files stay as they are. "" if it is used."""
    used_bytes: int = 0
    """Size of the blobs on it; included in the node's `used_bytes`."""
    blob_count: int = 0
    """Number of blobs on it."""
    free_bytes: int = 0
    """Free space of its disk."""
    headroom_bytes: int = 0
    """Part of the free space that Shoal leaves free."""
    reserved_bytes: int = 0
    """Space reserved for blobs that are arriving on it."""
    duplicate_bytes: int = 0
    """Size of blobs that another volume holds too; garbage."""


class StorageState(_Published):
    """Settings and use of a node's disk. `state` key `storage.<node>`, published by that node's storage."""

    node: str
    """The node."""
    used_bytes: int = 0
    """Size of all blobs, of the leaves of shards, and of unverified files."""
    reserved_bytes: int = 0
    """Bytes reserved for downloads that have not arrived yet."""
    free_bytes: int = 0
    """Free space of the store's disk."""
    model_count: int = 0
    """Complete models in the store."""
    blob_count: int = 0
    """Blobs in the store."""
    pinned: list[ModelId] = []
    """Models (`org/name@commit`) that are never evicted or deleted."""
    quarantined: list[str] = []
    """Corrupt blobs that were set aside."""
    leases: list[LeaseState] = []
    """Leases on models of this node."""
    overridden_by_env: list[str] = []
    """Settings that environment variables override; changing them in the file has no effect."""
    unverified_count: int = 0
    """Files that somebody put in a blob's place and that are not verified yet; offered to nobody."""
    unverified_bytes: int = 0
    """Size of those files; included in `used_bytes`."""
    foreign_count: int = 0
    """Foreign files in the store: not Shoal's, or not what their name says; never deleted."""
    foreign_bytes: int = 0
    """Size of the foreign files."""
    foreign_files: list[str] = []
    """Paths of the first foreign files, below the store."""
    store_missing: bool = False
    """Whether the store is missing, for example unmounted; its models are not offered then."""
    ended_downloads: list[ModelId] = []
    """Models (`org/name@commit`) of which only an ended download's bytes are left; evicted first."""
    paused_downloads: dict[ModelId, int] = {}
    """Bytes kept for paused downloads, by `org/name@commit`; included in `reserved_bytes` and `used_bytes`."""
    ballast_bytes: int = 0
    """Size of the ballast file, which is deleted first when the disk is full."""
    libraries: list[LibraryState] = []
    """Libraries of this node."""
    volumes: list[VolumeState] = []
    """Volumes besides the store's own, each with its own `free_bytes`."""
    distrusted_sealers: list[str] = []
    """Nodes that sealed a corrupt blob: their seals do not count here any more (docs/transfer.md)."""
    incomplete: list[ModelId] = []
    """Models (`org/name@commit`) of the store that have lost files, or whose files are corrupt; offered to nobody."""


class ModelState(WireStruct):
    """A model that is complete, verified and durable on a node.

    `state` key `model.<node>.<model@commit>`, published by that node's storage.
    """

    node: str
    """The node that holds the model."""
    repo: str
    """`org/name`."""
    commit: str
    """Commit id of the hub's repository."""
    size_bytes: int
    """Size of all distinct blobs."""
    file_count: int
    """Number of files."""
    revisions: list[str] = []
    """Revisions that people used for this commit."""
    shape: ModelShape | None = None
    """The model's shape; null if it is not a language model that Shoal can read."""
    shape_error: str = ""
    """Why there is no shape."""
    ready_at_s: float = 0.0
    """When the model became complete."""
    library_directory: str = ""
    """Its directory in a library; "" for a model of the store."""
    unchecked_from: str = ""
    """Node whose manifest it is, while the hub has not confirmed that; "" once it has, or if it is the hub's own."""

    @property
    def model(self) -> ModelId:
        """`org/name@commit`."""
        return model_id(self.repo, self.commit)


class ShardState(WireStruct):
    """A shard: what stages with some layers need of a model, verified and durable on a node that lacks the rest.

    `state` key `shard.<node>.<model@commit>`, published by that node's storage.
    """

    node: str
    """The node that holds the shard."""
    repo: str
    """`org/name`."""
    commit: str
    """Commit id of the hub's repository."""
    layers: list[list[int]]
    """Layer ranges `[first, last)`, in order."""
    size_bytes: int
    """Bytes of the shard."""
    total_bytes: int
    """Bytes of the whole model."""
    revisions: list[str] = []
    """Revisions that people used for this commit."""

    @property
    def model(self) -> ModelId:
        """`org/name@commit`."""
        return model_id(self.repo, self.commit)


class PlanEviction(WireStruct):
    """`svc.storage.<node>.plan`: what would be evicted to admit this many bytes; evicts nothing."""

    need_bytes: int
    """Bytes to be admitted."""


class Victim(WireStruct):
    """A model in an eviction plan."""

    model: ModelId
    """`org/name@commit`."""
    freed_bytes: int
    """Bytes that evicting it frees at its place in the plan."""
    last_use_s: float
    """When it was last used; of an ended download, when it was last requested."""


class EvictionPlan(WireStruct):
    """What to evict, in order: garbage, ended downloads, victims. A dry run returns the same struct."""

    required_bytes: int
    """Bytes that have to be freed."""
    garbage: list[str] = []
    """Blobs that nothing refers to."""
    garbage_bytes: int = 0
    """Size of the garbage."""
    victims: list[Victim] = []
    """Models to evict, in order."""
    freed_bytes: int = 0
    """Bytes that the whole plan frees."""
    enough: bool = False
    """Whether the plan frees enough. If not, nothing is evicted and the lists are empty."""
    evictable_bytes: int = 0
    """Bytes that could be evicted at most."""
    protected: dict[ModelId, str] = {}
    """Protected models, and why: `pinned`, `used by instance x and me (pid 4711)`, `being fetched`."""
    ended_downloads: list[Victim] = []
    """Bytes that ended downloads have left, oldest first."""


class CheckSpace(WireStruct):
    """`svc.storage.<node>.check_space`: does this model, whose download a full disk has stopped, fit the disk now?"""

    model: ModelId
    """`org/name@commit`."""


class SpaceCheck(WireStruct):
    """Whether all running downloads fit the disk now."""

    enough: bool
    """Whether they fit."""
    lacking_bytes: int = 0
    """Bytes that are missing."""
    free_bytes: int = 0
    """Free space of the disk."""
    headroom_bytes: int = 0
    """Part of the free space that Shoal leaves free."""
    volume: str = ""
    """Path of the full volume; "" for the store itself."""
    out_of_inodes: bool = False
    """Whether the file system takes no further file, whatever its free space."""
    evicted: EvictionPlan | None = None
    """The eviction that this request caused, if the policy allows one: one plan for all running downloads."""


class RecordUse(WireStruct):
    """`svc.storage.<node>.record_use`: record that inference used these models now."""

    models: list[ModelId]
    """`org/name@commit` each."""


class Reserve(WireStruct):
    """`svc.storage.<node>.reserve`: reserve space for a model's blobs. Repeating it renews the same reservation."""

    manifest: Manifest
    """The model's files."""
    leaf_ranges: dict[str, list[list[int]]] = {}
    """Leaf ranges `[first, last)` to reserve, by blob; an empty list means none. Blobs not listed need all leaves."""


class ReserveResult(WireStruct):
    """A reservation; the missing blobs' partial directories exist."""

    present: list[str]
    """Blobs that the store has already."""
    missing: list[str]
    """Blobs to be fetched."""
    evicted: EvictionPlan | None = None
    """The eviction that made space, if any."""
    sha256_by_git_name: dict[str, str] = {}
    """sha256 of the present files that the manifest names by git's sha1 only, by blob name."""


class Release(WireStruct):
    """`svc.storage.<node>.release`: end an unsuccessful download's reservation; delete bytes that only it needs."""

    model: ModelId
    """`org/name@commit`."""
    blobs: list[str] = []
    """The model's complete blobs here. Storage finds its partial blobs by itself."""


class CommitBlob(WireStruct):
    """`svc.storage.<node>.commit`: verify a complete partial blob and make it a blob."""

    blob: str
    """The blob's name."""
    leaf_list_digest: str = ""
    """Digest of a sealed leaf list to verify each leaf against; "" means the whole blob is verified by sha256."""
    seal: LeafListSeal | None = None
    """Seal of that list. Without one that counts here, the whole blob is verified by sha256."""


class CommittedBlob(WireStruct):
    """A blob that is durable under its sha256."""

    sha256: str
    """The blob's sha256."""
    size_bytes: int
    """Size of the blob."""
    leaf_list_digest: str = ""
    """Its leaf list digest; "" if unknown."""


class SealModel(WireStruct):
    """`svc.storage.<node>.seal`: write the manifest of a model whose blobs are all present, and publish the model."""

    manifest: Manifest
    """The sealed manifest."""


class SealShard(WireStruct):
    """`svc.storage.<node>.seal_shard`: check, record and publish the shard that stages with these layers need."""

    manifest: Manifest
    """The sealed manifest of the whole model."""
    layers: list[list[int]]
    """Layer ranges `[first, last)` of the shard."""
    leaf_ranges: dict[str, list[list[int]]]
    """Needed leaf ranges, by blob, of blobs that are not needed whole, as in `reserve`."""
    leaf_list_digests: dict[str, str]
    """Digest of the sealed leaf list of each of these blobs; the list lies beside the partial blob's data."""
    seals: dict[str, LeafListSeal] = {}
    """Seals of these lists, by blob."""


class GetManifest(WireStruct):
    """`svc.storage.<node>.manifest`: the manifest of a model that this node holds, or `not_found`."""

    model: str
    """`org/name@revision`."""
    include_incomplete: bool = False
    """Also answer for an incomplete model; the node's own fetcher asks that to repair it."""


class Delete(Command):
    """`cmd.storage.<node>.delete`: delete a model from this node. Deleting an absent model succeeds."""

    model: str
    """`org/name@revision`, or `org/name` for all its revisions."""


class Configure(_Changes):
    """`cmd.storage.<node>.configure`: change this node's storage settings now and in its file (settings.md).

    Fields left out keep their value. `libraries` and `volumes` are refused: they are set on the node itself.
    """

    if TYPE_CHECKING:  # whose checkers do not see the fields

        def __init__(self, **fields: Any) -> None: ...


class Reload(Command):
    """`cmd.storage.<node>.reload`: read this node's storage settings from its file again, and apply them now."""


class Pin(Command):
    """`cmd.storage.<node>.pin`: protect a model of this node from eviction and deletion."""

    model: str
    """`org/name@revision`, or `org/name` for all its revisions."""
    pinned: bool = True
    """False unpins the model."""


class CollectGarbage(Command):
    """`cmd.storage.<node>.gc`: delete blobs that nothing refers to."""


class Verify(Command):
    """`cmd.storage.<node>.verify`: hash a model's blobs again and quarantine the corrupt ones."""

    model: str = ""
    """`org/name`, with or without `@revision`; "" means all models of this node."""
