"""Frames of the ring: header, meta, payload. Pure; docs/wire-activations.md has the table and a sample.

Everything is little-endian. A header is checked whole before a byte after it is read, so nothing a peer announces
is ever allocated beyond the limits here.
"""

from __future__ import annotations

import enum
import hashlib
import struct

import msgspec

from shoal_inference.stage.errors import BadFrame

MAGIC = b"SHLA"
VERSION = 1
MAX_META_BYTES = 4 * 1024 * 1024
"""An OPEN carries what an earlier epoch generated: 400,000 token ids fit."""
MAX_PAYLOAD_BYTES = 256 * 1024 * 1024
"""2048 tokens of a 32,768 wide f32 hidden state."""
ID_BYTES = 16
RING_BYTES = 8

_HEADER = struct.Struct("<4sBBBB8s16sIIIIQHH4s")
HEADER_BYTES = _HEADER.size


class Kind(enum.IntEnum):
    """What a frame is for."""

    OPEN = 1
    HIDDEN = 2
    TOKEN = 3
    END = 4
    FAIL = 5


class Dtype(enum.IntEnum):
    """Element type of a payload; NONE when there is none."""

    NONE = 0
    BF16 = 1
    F16 = 2
    F32 = 3
    I32 = 4


ITEM_BYTES = {Dtype.NONE: 0, Dtype.BF16: 2, Dtype.F16: 2, Dtype.F32: 4, Dtype.I32: 4}


class Flag(enum.IntFlag):
    """HIDDEN: SAMPLE asks the last rank for a token. TOKEN: FINISHED says the answer is complete."""

    NONE = 0
    SAMPLE = 1
    FINISHED = 2


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The 64 bytes every frame begins with. The payload's shape is (batch, tokens, width)."""

    kind: Kind
    ring: bytes
    request: bytes
    seq: int = 0
    flags: Flag = Flag.NONE
    dtype: Dtype = Dtype.NONE
    batch: int = 0
    tokens: int = 0
    width: int = 0
    meta_bytes: int = 0
    payload_bytes: int = 0


class Frame(msgspec.Struct, frozen=True):
    """One frame, whole."""

    header: Header
    meta: bytes = b""
    payload: bytes = b""


class Open(msgspec.Struct, frozen=True, kw_only=True):
    """Meta of OPEN: what every stage must know of a request."""

    request: str
    first_index: int
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    generated: tuple[int, ...]


class End(msgspec.Struct, frozen=True, kw_only=True):
    """Meta of END. After "cancelled" the last rank still owes the client the last word."""

    reason: str


def ring_tag(instance: str, epoch: int) -> bytes:
    """The 8 bytes that name one incarnation of an instance's ring: a stale peer's frames do not match."""
    return hashlib.sha256(f"{epoch}:{instance}".encode()).digest()[:RING_BYTES]


def make_frame(
    kind: Kind,
    ring: bytes,
    request: bytes,
    *,
    seq: int = 0,
    flags: Flag = Flag.NONE,
    dtype: Dtype = Dtype.NONE,
    shape: tuple[int, int, int] = (0, 0, 0),
    meta: bytes = b"",
    payload: bytes = b"",
) -> Frame:
    """A frame whose lengths agree with its parts."""
    batch, tokens, width = shape
    header = Header(
        kind=kind,
        ring=ring,
        request=request,
        seq=seq,
        flags=flags,
        dtype=dtype,
        batch=batch,
        tokens=tokens,
        width=width,
        meta_bytes=len(meta),
        payload_bytes=len(payload),
    )
    check_header(header)
    return Frame(header, meta, payload)


def encode_header(header: Header) -> bytes:
    """The header's 64 bytes."""
    return _HEADER.pack(
        MAGIC,
        VERSION,
        header.kind,
        header.dtype,
        header.flags,
        header.ring,
        header.request,
        header.seq,
        header.tokens,
        header.width,
        header.meta_bytes,
        header.payload_bytes,
        header.batch,
        0,
        bytes(4),
    )


def encode_frame(frame: Frame) -> bytes:
    """The whole frame as one run of bytes."""
    return encode_header(frame.header) + frame.meta + frame.payload


def decode_header(data: bytes, *, max_payload_bytes: int = MAX_PAYLOAD_BYTES) -> Header:
    """The header in 64 bytes; raises BadFrame saying which field is wrong."""
    (
        magic,
        version,
        kind,
        dtype,
        flags,
        ring,
        request,
        seq,
        tokens,
        width,
        meta_bytes,
        payload_bytes,
        batch,
        *reserved,
    ) = _HEADER.unpack(data)
    if magic != MAGIC:
        raise BadFrame(f"magic is {magic!r}, not {MAGIC!r}: the peer does not speak this protocol")
    if version != VERSION:
        raise BadFrame(f"version is {version}, this stage speaks {VERSION}: run the same Shoal on every node")
    if any(reserved[0:1]) or reserved[1] != bytes(4) or flags > (Flag.SAMPLE | Flag.FINISHED):
        raise BadFrame("reserved bits are set: the peer is newer than this stage")
    try:
        header = Header(
            kind=Kind(kind),
            ring=ring,
            request=request,
            seq=seq,
            flags=Flag(flags),
            dtype=Dtype(dtype),
            batch=batch,
            tokens=tokens,
            width=width,
            meta_bytes=meta_bytes,
            payload_bytes=payload_bytes,
        )
    except ValueError as error:
        raise BadFrame(f"{error}: not in version {VERSION}") from None
    check_header(header, max_payload_bytes=max_payload_bytes)
    return header


def check_header(header: Header, *, max_payload_bytes: int = MAX_PAYLOAD_BYTES) -> None:
    """Raises BadFrame unless lengths are within the limits and agree with the shape."""
    if header.meta_bytes > MAX_META_BYTES:
        raise BadFrame(f"meta of {header.meta_bytes} bytes exceeds {MAX_META_BYTES}")
    if header.payload_bytes > max_payload_bytes:
        raise BadFrame(f"payload of {header.payload_bytes} bytes exceeds {max_payload_bytes}")
    shaped = header.batch * header.tokens * header.width * ITEM_BYTES[header.dtype]
    if header.payload_bytes != shaped:
        raise BadFrame(f"payload of {header.payload_bytes} bytes, but its shape and dtype take {shaped}")
