"""RPC requests between services (NATS micro, `shoal.v1.svc.<service>.<node>.<verb>`) and their replies.

Every reply is an `RpcReply`: a result, or an error that the client raises again.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from shoal_common.errors import ErrorBody
from shoal_common.messages import Message
from shoal_common.messages.records import Manifest, ModelShape


class Answer(Message):
    """The envelope of every RPC reply."""

    result: msgspec.Raw = msgspec.Raw(b"{}")
    """The reply itself, if the request succeeded."""
    error: ErrorBody | None = None
    """Why it failed, if it failed."""


class Done(Message):
    """A request or reply without content."""


class AskPlan(Message):
    """`svc.storage.<node>.plan`: what would be evicted to admit this many bytes; evicts nothing."""

    need_bytes: int
    """Bytes to be admitted."""


class Victim(Message):
    """A model in an eviction plan."""

    model: str
    """`org/name@commit`."""
    frees_bytes: int
    """Bytes that evicting it frees at its place in the plan."""
    last_use_s: float
    """When it was last used; of an ended download, when it was last requested."""


class EvictionPlan(Message):
    """What to evict, in order: garbage, ended downloads, victims. A dry run returns the same struct."""

    need_bytes: int
    """Bytes that have to be freed."""
    garbage: list[str] = []
    """Blobs that nothing refers to."""
    garbage_bytes: int = 0
    """Size of the garbage."""
    victims: list[Victim] = []
    """Models to evict, in order."""
    frees_bytes: int = 0
    """Bytes that the whole plan frees."""
    enough: bool = False
    """Whether the plan frees enough. If not, nothing is evicted and the lists are empty."""
    evictable_bytes: int = 0
    """Bytes that could be evicted at most."""
    kept: dict[str, str] = {}
    """Protected models, and why: `pinned`, `used by instance x and me (pid 4711)`, `being fetched`."""
    unfinished: list[Victim] = []
    """Bytes that ended downloads have left, oldest first."""


class AskRoom(Message):
    """`svc.storage.<node>.room`: does this model, whose download a full disk has stopped, fit the disk now?

    Storage evicts if its policy allows it: one plan for all running downloads.
    """

    model: str
    """`org/name@commit`."""


class RoomLeft(Message):
    """Whether all running downloads fit the disk now."""

    enough: bool
    """Whether they fit."""
    lacking_bytes: int = 0
    """Bytes that are missing."""
    free_bytes: int = 0
    """Free space of the disk."""
    headroom_bytes: int = 0
    """Part of the free space that Shoal leaves free."""
    words: str = ""
    """The same for people: `3.2 GB more needed, 0 B free`."""
    evicted: EvictionPlan | None = None
    """The eviction that this request caused, if any."""


class NoteUse(Message):
    """`svc.storage.<node>.used`: record that inference used these models now."""

    models: list[str]
    """`org/name@commit` each."""


class Reserve(Message):
    """`svc.storage.<node>.reserve`: reserve space for a model's blobs. Repeating it renews the same reservation."""

    manifest: Manifest
    """The model's files."""
    leaves: dict[str, list[list[int]]] = {}
    """Leaf ranges `[first, last)` to reserve, by blob; an empty list means none. Blobs not listed need all leaves."""


class Reserved(Message):
    """A reservation; the missing blobs' partial directories exist."""

    present: list[str]
    """Blobs that the store has already."""
    missing: list[str]
    """Blobs to be fetched."""
    evicted: EvictionPlan | None = None
    """The eviction that made space, if any."""
    known: dict[str, str] = {}
    """sha256 of the present files that the manifest names by git's sha1 only, by blob name."""


class Release(Message):
    """`svc.storage.<node>.release`: end an unsuccessful download's reservation; delete bytes that only it needs."""

    manifest: Manifest
    """The manifest that was reserved."""


class CommitBlob(Message):
    """`svc.storage.<node>.commit`: verify a complete partial blob and make it a blob."""

    blob: str
    """The blob's name."""
    root: str = ""
    """Digest of a sealed leaf list to verify each leaf against; "" means the whole blob is verified by sha256."""


class Committed(Message):
    """A blob that is durable under its sha256."""

    sha256: str
    """The blob's sha256."""
    size_bytes: int
    """Size of the blob."""
    root: str = ""
    """Its leaf list digest; "" if unknown."""


class SealModel(Message):
    """`svc.storage.<node>.seal`: write the manifest of a model whose blobs are all present, and publish the model."""

    manifest: Manifest
    """The sealed manifest."""


class SealPart(Message):
    """`svc.storage.<node>.seal_part`: check, record and publish the shard that stages with these layers need."""

    manifest: Manifest
    """The sealed manifest of the whole model."""
    layers: list[list[int]]
    """Layer ranges `[first, last)` of the shard."""
    leaves: dict[str, list[list[int]]]
    """Needed leaf ranges, by blob, of blobs that are not needed whole, as in `reserve`."""
    roots: dict[str, str]
    """Digest of the sealed leaf list of each of these blobs; the list lies beside the partial blob's data."""


class AskManifest(Message):
    """`svc.storage.<node>.manifest`: the manifest of a model that this node holds, or `not_found`."""

    model: str
    """`org/name@revision`."""
    broken: bool = False
    """Also answer for an incomplete model; the node's own fetcher asks that to repair it."""


class AskLease(Message):
    """`svc.storage.<node>.lease`: a lease on a model, with a view of its own; the model stays while it is held."""

    model: str
    """`org/name@revision`."""
    holder: str
    """Who asks, in words for people."""
    instance: str = ""
    """The instance that uses the model, if any."""
    layers: list[int] = []
    """`[first, last)`: a shard with what a stage with these layers needs is enough, if the model is not complete."""


class Leased(Message):
    """A lease. It lasts while a process holds a flock on `lock`, and ends when none does, however that came about."""

    id: str
    """The lease's id."""
    commit: str
    """Commit of the model."""
    view: str
    """Absolute path of the directory with the model's files."""
    lock: str
    """Absolute path of the file to take a shared flock on, within 30 s."""
    leaves: dict[str, list[list[int]]] = {}
    """For a shard: available leaf ranges of each incomplete file, by path in the view. The other bytes are zeros."""


class Unlease(Message):
    """`svc.storage.<node>.unlease`: end a lease that nobody holds; one that has ended already is fine."""

    id: str
    """The lease's id."""


class Withdraw(Message):
    """`svc.fetcher.<node>.withdraw`: drop the download requests for these models; answered once they have stopped."""

    repo: str
    """`org/name`."""
    revision: str = ""
    """Only this revision; "" means all of the repository."""


class AskShape(Message):
    """`svc.fetcher.<node>.shape`: size and shape of a model by the hub's listing and its files' headers."""

    model: str
    """`org/name@revision`; no node has to hold it."""


class ModelSize(Message):
    """What a model needs that may be on no node yet. Nothing of it is verified."""

    model: str
    """`org/name@commit`, with the commit that the revision means now."""
    size_bytes: int
    """Size of all its files."""
    shape: ModelShape
    """The model's shape."""


class ChatMessage(Message):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool", "developer"]
    """Who speaks."""
    content: str
    """The text."""


class Generate(Message):
    """`svc.inference.<node>.generate`: generate an answer, on the node with rank 0 of the instance."""

    instance: str
    """The instance's id."""
    request: str
    """Id of the request; tokens go to `shoal.v1.tok.<request>`."""
    messages: list[ChatMessage] = []
    """The conversation, to which the model's chat template is applied."""
    prompt_tokens: list[int] = []
    """The prompt as token ids, instead of messages."""
    generated: list[int] = []
    """Tokens that an earlier epoch produced: they follow the prompt, and `index` continues after them."""
    max_tokens: int = 512
    """Maximum number of tokens to generate."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus sampling: cumulative probability of the tokens sampled from."""
    seed: int | None = None
    """Seed of the sampler; null means a random one."""


class Accepted(Message):
    """The prompt fits the context, and generation has started."""

    request: str
    """Id of the request."""
    prompt_tokens: int
    """Length of the prompt."""


class CancelGenerate(Message):
    """`svc.inference.<node>.cancel`: stop generating an answer, on the node with rank 0 of the instance."""

    instance: str
    """The instance's id."""
    request: str
    """Id of the request."""


FinishReason = Literal["stop", "length", "cancelled"]


class TokenEvent(Message):
    """One token of an answer, or the error that ended it.

    Subject `shoal.v1.tok.<request>` (core NATS, not stored), published by inference of the node with rank 0.
    """

    request: str
    """Id of the request."""
    index: int = 0
    """Number of the token, from 0; -1 carries no token: the answer waits for KV cache and will continue."""
    token: int | None = None
    """Token id; null if none was sampled: the answer was cancelled, or complete already."""
    text: str = ""
    """Text that the token completes, in whole characters; may be empty."""
    finish_reason: FinishReason | None = None
    """Why the answer has ended; null while it continues."""
    error: ErrorBody | None = None
    """The error that ended the answer; an event with an error is the last one, whatever its index."""


class PreviewStage(Message):
    """What a stage would need on its node, and what the node has."""

    node: str
    """The node."""
    first_layer: int
    """First layer."""
    last_layer: int
    """The layer after the last one."""
    needed_bytes: int
    """Memory that the stage needs."""
    available_bytes: int
    """Memory that is free for one more stage: the tier `fits`."""
    tight_bytes: int
    """Memory that is free once other programs give up some: the tier `tight`."""
    total_bytes: int
    """Memory of the node."""
    freeing_bytes: int
    """Memory that other programs have to free until the stage fits; 0 if it fits."""
    link_s: float = 0.0
    """Time to pass a token's hidden state to the next stage, from the last one to the first; 0 for a single stage."""
    link_measured: bool = False
    """Whether `link_s` was measured, not estimated from the kind of link."""


class Preview(Message):
    """A possible layout."""

    layout: str
    """The layout as `place` takes it: `a:14,b:2`."""
    tier: Literal["fits", "tight", "force"]
    """Memory tier that it needs."""
    is_low_memory: bool
    """Whether other programs would have to give up memory; `place` has to allow that."""
    stages: list[PreviewStage]
    """The stages in rank order."""
    tokens_per_s: float
    """Predicted rate of all answers together, from the nodes' memory bandwidth."""
    first_token_s: float
    """Predicted time to the first token of a short prompt: one pass through all stages. Long prompts add prefill."""
    fetch_bytes: int
    """Bytes that all nodes together would download."""


class Previews(Message):
    """Possible layouts of a model. The first is what `place` would choose, if the request allows its tier."""

    model: str
    """`org/name@commit`."""
    context_tokens: int
    """Context length that the layouts reserve KV cache for."""
    estimated: bool
    """The model's architecture is unknown: its memory need is an upper bound."""
    previews: list[Preview]
    """The layouts, best first."""


class AskFits(Message):
    """`svc.placement.<node>.fits`: which models that nodes hold could be placed now."""

    context_tokens: int = 0
    """Context length, as in `place`."""


class Fit(Message):
    """A model, and its best layout."""

    model: str
    """`org/name@commit`."""
    size_bytes: int
    """Size of the model."""
    tier: Literal["fits", "tight", "force", ""] = ""
    """Memory tier that the model needs; "" if it does not fit at all."""
    preview: Preview | None = None
    """Its best layout; null if there is none."""
    why: str = ""
    """Why it cannot be placed."""


class Fits(Message):
    """Models by tier, those that fit first; within a tier the larger first."""

    models: list[Fit]
    """The models."""


class AskRebalances(Message):
    """`svc.placement.<node>.rebalances`: which instances would run better in another layout."""


class Rebalancing(Message):
    """An instance's layout, and a better one. Nothing moves by itself."""

    instance: str
    """The instance's id."""
    model: str
    """`org/name@commit`."""
    now: Preview
    """The current layout."""
    better: Preview
    """The proposed layout; its `fetch_bytes` is what the move would download."""
    gain: float
    """Cost of the current layout over the proposed one's, by the objective that was asked for.

    Less than 1 if a slower layout leaves other programs their memory.
    """


class Rebalances(Message):
    """Proposed moves, largest gain first."""

    rebalances: list[Rebalancing]
    """The proposals."""


class AskLinks(Message):
    """`svc.placement.<node>.links`: measure the links to these peers, unless they were measured within the hour."""

    peers: list[str]
    """Node ids, 16 at most."""
