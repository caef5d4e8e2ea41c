"""What parent and child say to each other: tagged structs, one JSON object a line, over the inherited socketpair.

Order: `Start` first, once; then anything. The child answers `Listening`, `Loaded`, and, with more than one stage,
`Linked` once both its neighbours are connected. A request and its answer are the structs of the protocol
(`shoal_common.messages.generation`), which the parent passes on. Each request ends with exactly one event with a
`finish_reason` or an `error` *per stage that sees the end*: several stages may send an error for one request (the
first to reach the client counts), and none says anything after its own.
"""

from __future__ import annotations

import msgspec

from shoal_common.errors import ErrorBody
from shoal_common.messages.generation import Accepted, Generate, TokenEvent
from shoal_common.models.kv_cache import MAX_REQUESTS_PER_INSTANCE

MAX_LINE_BYTES = 16 * 1024 * 1024
"""Longest line either side accepts: a prompt of a million token ids fits."""


class _IpcMessage(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag=str.lower):
    """Base of what crosses the socketpair; `type` is the class's name in lower case."""


# parent → child


class StageTls(msgspec.Struct, frozen=True, kw_only=True):
    """What TLS needs of the node's identity: the authority's certificate (PEM, base64 in JSON), and files."""

    authority: bytes
    certificate_file: str
    key_file: str


class Start(_IpcMessage, frozen=True, kw_only=True):
    """Who this stage is, what it loads and its limits. The first line; never repeated."""

    instance: str
    epoch: int
    rank: int
    stages: int
    nodes: tuple[str, ...] = ()
    """The node of each rank, for the log."""
    model_dir: str
    lock: str = ""
    """The lock of the lease on `model_dir`, held from before the first read until the end; "" where nobody keeps
    count of who uses those files."""
    leaves: dict[str, list[list[int]]] = {}
    """Of files of which not all is there, by path, the leaves that are, `[first, last)` each; all else is zeros."""
    first_layer: int
    last_layer: int
    """Exclusive."""
    context_tokens: int = 0
    """Prompt and answer together; 0 means the model's max_position_embeddings."""
    bind_host: str = "127.0.0.1"
    ports: tuple[int, ...] = (0,)
    """To listen on the first that is free, 0 standing for any."""
    successor_secret: bytes = b""
    """Shared with the next stage, base64 in JSON. Proves at connect who both are."""
    predecessor_secret: bytes = b""
    """The same with the stage before."""
    tls: StageTls | None = None
    """For connecting; None outside a cluster."""
    is_encrypted: bool = False
    """Whether the own port speaks TLS. It does beyond loopback."""
    step_timeout_s: float = 60.0
    """Longest silence of the ring towards a request, and longest single forward pass."""
    encode_cpu_s: float = 10.0
    """Computing time within which a prompt must be rendered and tokenized."""
    prefill_chunk_tokens: int = 2048
    frame_timeout_s: float = 10.0
    """For connecting, for writing a frame, and for the rest of one whose first byte has come."""
    idle_limit_s: float = 0.0
    """After this long without a frame a request's caches are dropped; 0 means 4 * step_timeout_s."""
    max_requests: int = MAX_REQUESTS_PER_INSTANCE
    max_parallel_answers: int = 1
    """Answers as long as the context for which there is room at once; more requests than that share it."""

    def node_of(self, rank: int) -> str:
        """Return the node of a rank; "-" where the parent has not named it."""
        return self.nodes[rank] if rank < len(self.nodes) else "-"


class SetSuccessor(_IpcMessage, frozen=True, kw_only=True):
    """Where the next stage listens. Said again when it was reborn elsewhere."""

    host: str
    port: int
    server_hostname: str = ""
    """The name that its certificate must have; "" if the port does not speak TLS."""


class StartRequest(_IpcMessage, frozen=True, kw_only=True):
    """Answer a prompt; rank 0 only. A request that is in flight already is not started twice."""

    generate: Generate
    """`max_tokens` counts the whole answer, `generated_tokens` included: those are not said again."""


class Cancel(_IpcMessage, frozen=True, kw_only=True):
    """Stop a request; rank 0 only. The answer ends with `finish_reason` "cancelled". Unknown ones are ignored."""

    request: str


class GetStats(_IpcMessage, frozen=True, kw_only=True):
    """Ask for `Stats`. Nothing sends figures unasked: an idle stage is silent."""


class Stop(_IpcMessage, frozen=True, kw_only=True):
    """Close everything and exit with status 0."""


# child → parent


class Listening(_IpcMessage, frozen=True, kw_only=True):
    """The port predecessors connect to; 0 with a single stage, which has no sockets."""

    port: int


class Loaded(_IpcMessage, frozen=True, kw_only=True):
    """The own layers are in memory. Bytes by MLX's count; `weight_bytes` is what the own tensors must take."""

    weight_bytes: int
    active_bytes: int
    peak_bytes: int
    load_s: float
    context_tokens: int
    model_type: str


class Linked(_IpcMessage, frozen=True, kw_only=True):
    """Predecessor and successor are both connected and authenticated."""


class Unlinked(_IpcMessage, frozen=True, kw_only=True):
    """One of them is gone. The stage keeps its weights, listens, and tries the last `Link` address."""

    reason: str
    rank: int
    """The neighbour that was lost."""


class RequestAccepted(_IpcMessage, frozen=True, kw_only=True):
    """Rank 0 has tokenised the prompt and starts prefill."""

    accepted: Accepted


class RequestEvent(_IpcMessage, frozen=True, kw_only=True):
    """A token, from the last rank; an error, from any; or, from rank 0, that a request waits for room in the cache.

    Indices of tokens have no gaps. With `finish_reason` "stop" `token` is the end-of-text id and `text` what was held
    back.
    """

    event: TokenEvent


class StageStats(_IpcMessage, frozen=True, kw_only=True):
    """The answer to `GetStats`: `requests` known to the stage, `sessions` whose caches MLX holds."""

    requests: int
    sessions: int
    active_bytes: int
    peak_bytes: int
    unknown_frames: int
    """Frames dropped because nobody knew their request any more."""
    refused_connections: int
    displaced: int = 0
    """Times that a request gave its room in the cache to an older one, and began again; rank 0 only."""


class PassTiming(_IpcMessage, frozen=True, kw_only=True):
    """How long passes of one token of one answer have taken, computing alone: their median, and how many. Told by a
    stage that works, every 10 s at most."""

    pass_s: float
    passes: int


class Fatal(_IpcMessage, frozen=True, kw_only=True):
    """The child cannot go on and exits with status 1."""

    error: ErrorBody


ToChild = Start | SetSuccessor | StartRequest | Cancel | GetStats | Stop
FromChild = Listening | Loaded | Linked | Unlinked | RequestAccepted | RequestEvent | StageStats | PassTiming | Fatal

_encoder = msgspec.json.Encoder()
_to_child: msgspec.json.Decoder[ToChild] = msgspec.json.Decoder(ToChild)
_from_child: msgspec.json.Decoder[FromChild] = msgspec.json.Decoder(FromChild)


def encode_line(message: ToChild | FromChild) -> bytes:
    """One message as one line; JSON escapes newlines, so a line is a message."""
    return _encoder.encode(message) + b"\n"


def decode_to_child(line: bytes) -> ToChild:
    """What the parent said; raises DECODE_ERRORS."""
    return _to_child.decode(line)


def decode_from_child(line: bytes) -> FromChild:
    """What the child said; raises DECODE_ERRORS."""
    return _from_child.decode(line)
