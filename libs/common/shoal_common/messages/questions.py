"""Questions between services (NATS micro, `shoal.v1.svc.<service>.<node>.<verb>`) and their answers.

Every answer is an `Answer`: a result, or the error that the asker raises again on its side.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from shoal_common.errors import ErrorBody
from shoal_common.messages import Message
from shoal_common.messages.records import Manifest, ModelShape


class Answer(Message):
    """The envelope of every reply."""

    result: msgspec.Raw = msgspec.Raw(b"{}")
    error: ErrorBody | None = None


class Done(Message):
    """Nothing to say but that it was done."""


class AskPlan(Message):
    """storage.plan: what would go to make room for so many bytes? Nothing is done."""

    need_bytes: int


class Victim(Message):
    """A model that a plan evicts, and the bytes that this frees at its place in the plan."""

    model: str
    frees_bytes: int
    last_use_s: float


class EvictionPlan(Message):
    """How room is made, in order: garbage, unfinished, victims. A dry run and the real thing are the same object."""

    need_bytes: int
    """Bytes that have to be freed."""
    garbage: list[str] = []
    """Blobs that nothing refers to."""
    garbage_bytes: int = 0
    victims: list[Victim] = []
    frees_bytes: int = 0
    """By all of them together."""
    enough: bool = False
    """Whether that meets the need. If not, nothing is evicted, and the lists are empty."""
    evictable_bytes: int = 0
    """What could go at most."""
    kept: dict[str, str] = {}
    """Models that may not go, and why: `pinned`, `used by instance x and me (pid 4711)`, `being fetched`."""
    unfinished: list[Victim] = []
    """What ended downloads have left, oldest first; `last_use_s` is when they were last wanted."""


class AskRoom(Message):
    """storage.room: the disk was full while this model (`org/name@commit`) arrived; is there room now?

    Storage makes some where its policy is to: one plan, for all that is on its way.
    """

    model: str


class RoomLeft(Message):
    """Whether all that is on its way fits the disk now."""

    enough: bool
    lacking_bytes: int = 0
    free_bytes: int = 0
    headroom_bytes: int = 0
    words: str = ""
    """What is lacking, for people: `3.2 GB more needed, 0 B free`."""
    evicted: EvictionPlan | None = None
    """What was evicted for it now, if anything was."""


class NoteUse(Message):
    """storage.used: these models of this node were used now, for inference."""

    models: list[str]


class Reserve(Message):
    """storage.reserve: may these blobs come in? Asking again renews the same reservation."""

    manifest: Manifest
    leaves: dict[str, list[list[int]]] = {}
    """Of these blobs only these leaves, `[first, last)` each; of one with an empty list none. Of the others all."""


class Reserved(Message):
    """Approved. `present` blobs need no fetching; the others have their partial directories ready."""

    present: list[str]
    missing: list[str]
    evicted: EvictionPlan | None = None
    """What was evicted to make room, if anything was."""
    known: dict[str, str] = {}
    """sha256 of files that the manifest names by git's sha1 only and whose bytes are here already."""


class Release(Message):
    """storage.release: this fetch has ended without success; its reservation ends. Bytes only it wanted go."""

    manifest: Manifest


class CommitBlob(Message):
    """storage.commit: this partial is complete; verify all of it and make it a blob."""

    blob: str
    root: str = ""
    """Root of a leaf list that is sealed: the partial's own list is compared with it, and each leaf with the list.
    "": the whole is hashed by sha256."""


class Committed(Message):
    """A blob is durable under its sha256."""

    sha256: str
    size_bytes: int
    root: str = ""
    """Of its leaf list; "" where none is known."""


class SealModel(Message):
    """storage.seal: all blobs of this sealed manifest are present; write it, build the view, announce the model."""

    manifest: Manifest


class SealPart(Message):
    """storage.seal_part: what stages with these layers need is here; check it, remember it, announce the part."""

    manifest: Manifest
    layers: list[list[int]]
    leaves: dict[str, list[list[int]]]
    """As in `reserve`: the leaves that are needed of blobs of which not all is."""
    roots: dict[str, str]
    """Of each of these blobs the root of its leaf list, which is sealed; the list is beside the partial's data."""


class AskManifest(Message):
    """storage.manifest: the manifest of `org/name@revision` as this node holds it, or `not_found`."""

    model: str
    broken: bool = False
    """Also of a model that has lost blobs: asked of its own node by a fetcher that is to bring them back."""


class AskLease(Message):
    """storage.lease: a view of `org/name@revision` for one caller alone; the model stays while it is held."""

    model: str
    holder: str
    """Who asks, in words for people."""
    instance: str = ""
    """The instance that it is for, if it is for one."""
    layers: list[int] = []
    """`[first, last)`: where the model is not here, what a stage with these layers needs will do."""


class Leased(Message):
    """A lease. It lives while somebody holds a flock on `lock`, and ends when nobody does, however that came."""

    id: str
    commit: str
    view: str
    """Absolute path of the directory with the model's files."""
    lock: str
    """Absolute path of the file to take a shared flock on, within 30 s."""
    leaves: dict[str, list[list[int]]] = {}
    """Of a part: by path in the view, the leaves of files of which not all is there. Their other bytes are zeros."""


class Unlease(Message):
    """storage.unlease: this lease is not needed any more. One that has gone already is fine."""

    id: str


class Withdraw(Message):
    """fetcher.withdraw: forget any wish for these models and stop fetching them; answered once it has stopped."""

    repo: str
    revision: str = ""


class AskShape(Message):
    """fetcher.shape: what a model's layers take, by the hub's listing and the headers of its files."""

    model: str


class ModelSize(Message):
    """What a model would take that may be on no node yet. None of it is verified."""

    model: str
    """`org/name@commit`: the commit that the revision means now."""
    size_bytes: int
    """Of all its files."""
    shape: ModelShape


class ChatMessage(Message):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool", "developer"]
    content: str


class Generate(Message):
    """inference.generate, asked of the node with rank 0. Tokens go to `shoal.v1.tok.<request>`."""

    instance: str
    request: str
    messages: list[ChatMessage] = []
    prompt_tokens: list[int] = []
    generated: list[int] = []
    """Tokens that an earlier epoch produced: fed after the prompt, and numbering goes on after them."""
    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


class Accepted(Message):
    """The prompt fits and generation has begun."""

    request: str
    prompt_tokens: int


class CancelGenerate(Message):
    """inference.cancel, asked of the node with rank 0: nobody reads this answer any more."""

    instance: str
    request: str


FinishReason = Literal["stop", "length", "cancelled"]


class TokenEvent(Message):
    """One token of an answer on `shoal.v1.tok.<request>`, numbered from 0, or the error that ended it."""

    request: str
    index: int = 0
    """-1 is no token: the answer waits for room in the instance's cache, and will go on."""
    token: int | None = None
    """None where nothing was sampled: the answer was cancelled, or complete already."""
    text: str = ""
    finish_reason: FinishReason | None = None
    error: ErrorBody | None = None


class PreviewStage(Message):
    """What one node would take, and what it has for it."""

    node: str
    first_layer: int
    last_layer: int
    needed_bytes: int
    available_bytes: int
    """Free for one more stage: the tier `fits`."""
    tight_bytes: int
    """The same once other programs have given way."""
    total_bytes: int
    freeing_bytes: int
    """Once other programs have freed this much, it fits; 0 when it does."""
    link_s: float = 0.0
    """To pass a token's hidden state to the next stage, from the last back to the first; 0: it is the only one."""
    link_measured: bool = False
    """Whether that was measured, and is not what such links are taken for."""


class Preview(Message):
    """A layout that could be chosen. `layout` is what `place` takes to choose it: `a:14,b:2`."""

    layout: str
    tier: Literal["fits", "tight", "force"]
    is_low_memory: bool
    """Whether other programs would have to give memory back: `place` has to allow that."""
    stages: list[PreviewStage]
    tokens_per_s: float
    """Of all answers together, as predicted from what nodes read in a second."""
    first_token_s: float
    """Of a short prompt: once around, weights read once. A long one takes as much longer as it has to be computed."""
    fetch_bytes: int
    """What all nodes together would download."""


class Previews(Message):
    """The answer to `previews`: what `place` would choose comes first, if the request allows its tier."""

    model: str
    context_tokens: int
    estimated: bool
    """The model's architecture is not known: what it needs is an upper bound."""
    previews: list[Preview]


class AskFits(Message):
    """placement.fits: which of the models that nodes hold could be placed now."""

    context_tokens: int = 0
    """As `place` has it."""


class Fit(Message):
    """A model, and how it could be placed at best."""

    model: str
    size_bytes: int
    tier: Literal["fits", "tight", "force", ""] = ""
    """Into which memory; "" if into none."""
    preview: Preview | None = None
    why: str = ""
    """What keeps it from being placed."""


class Fits(Message):
    """The answer to `fits`: those that fit first, then those that are tight; of the same the larger first."""

    models: list[Fit]


class AskRebalances(Message):
    """placement.rebalances: which instances would stand better on other nodes, or with other layers."""


class Rebalancing(Message):
    """An instance as it stands, and a layout in which it would stand better. Nothing moves by itself."""

    instance: str
    model: str
    now: Preview
    better: Preview
    """Its `fetch_bytes` is what the move would download."""
    gain: float
    """The cost of now over the better one's, by the objective that was asked for; less than 1 where a slower layout
    leaves other programs their memory."""


class Rebalances(Message):
    """The answer to `rebalances`: what gains most comes first."""

    rebalances: list[Rebalancing]


class AskLinks(Message):
    """placement.links: measure the ways to these peers that have not been measured for an hour.

    Answered with the LinksState.
    """

    peers: list[str]
