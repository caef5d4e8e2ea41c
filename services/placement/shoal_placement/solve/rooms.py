"""What `decide.py` asks: a model's need over the rooms that nodes have for it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from shoal_placement.solve.answers import best
from shoal_placement.solve.even import emptiest
from shoal_placement.solve.problem import Layout, Links, Node, Problem

USUAL_BYTES_PER_S = 100e9
"""Of a node whose memory's bandwidth is not known: as a machine with two channels of DDR5 has."""
S_PER_BYTE = 1 / USUAL_BYTES_PER_S
LINK_S = 1e-3
"""To pass a hidden state to another node where nothing is known of the link: a wired network."""
FETCH_PRICE = 0.02
"""To download nothing of a model a layout may be so much slower than one that downloads it all: a token's time is
not known better, and a download takes minutes."""
ROOM_PRICE = 1e-4
"""The same between memory of which there is little and of which there is plenty; it decides between equals."""


class Need(msgspec.Struct, frozen=True):
    """What a model's parts take, in bytes, KV for the asked context included in its layer."""

    layer_bytes: list[int]
    embed_bytes: int = 0
    """On the first stage."""
    head_bytes: int = 0
    """On the last stage; when tied, the embedding's bytes are in here too."""
    tied: bool = False
    stage_bytes: int = 0
    """What every stage takes beside its layers."""
    weight_bytes: Sequence[int] = ()
    """Of each layer, without its cache: what is downloaded. Empty: `layer_bytes`."""
    layer_work_bytes: Sequence[int] = ()
    """Of each layer, what is read for a token. Empty: `layer_bytes`."""


class Room(msgspec.Struct, frozen=True):
    """A node that may take layers, and the bytes it has for them."""

    node: str
    free_bytes: int
    holds: bool = False
    """Whether the model is on its disk already."""
    s_per_byte: float = S_PER_BYTE
    """Seconds to read a byte of its memory: a layer is read once for each token."""
    lacks: Sequence[float] = ()
    """Of each layer, the share that is not on its disk; empty: all of it, or none where it `holds` the model."""


def problem_of(
    need: Need,
    rooms: Sequence[Room],
    min_nodes: int,
    max_nodes: int,
    link_s: Links = (),
    in_flight: int = 1,
) -> Problem:
    """The layout problem. A layer's work is what is read for a token; links that are not known take `LINK_S`."""
    count, weights = len(need.layer_bytes), need.weight_bytes or need.layer_bytes
    whole = max(sum(need.layer_bytes) + need.embed_bytes + need.head_bytes, 1)
    fastest = min((r.s_per_byte for r in rooms), default=S_PER_BYTE)
    nodes = [
        Node(
            name=r.node,
            free_bytes=r.free_bytes,
            s_per_work=r.s_per_byte,
            fetch_bytes=[round(b * lack) for b, lack in zip(weights, _lacks(r, count), strict=True)],
            fetch_embed_bytes=round(need.embed_bytes * _lacks(r, count)[0]),
            fetch_head_bytes=round(need.head_bytes * _lacks(r, count)[-1]),
            price_s_per_byte=ROOM_PRICE * fastest * whole / (whole + max(r.free_bytes, 0)),
        )
        for r in rooms
    ]
    work = need.layer_work_bytes or need.layer_bytes
    return Problem(
        nodes=nodes,
        layer_bytes=need.layer_bytes,
        layer_work=[float(max(b, 1)) for b in work],
        embed_bytes=need.embed_bytes,
        head_bytes=need.head_bytes,
        head_work=float(need.head_bytes),
        tied=need.tied,
        stage_bytes=need.stage_bytes,
        link_s=link_s if len(link_s) else np.where(np.eye(len(rooms), dtype=bool), 0.0, LINK_S),
        in_flight=in_flight,
        min_nodes=min_nodes,
        max_nodes=max_nodes,
        fetch_price_s_per_byte=FETCH_PRICE * fastest,
    )


def solved(problem: Problem) -> Layout | None:
    """The best layout; of those that are as good, the one that leaves the fullest node emptiest. None: none fits."""
    answer = best(problem)
    return None if answer.layout is None else emptiest(problem, answer.layout)


def _lacks(room: Room, count: int) -> Sequence[float]:
    return room.lacks or [0.0 if room.holds else 1.0] * count


def slice_bytes(need: Need, first: int, last: int) -> int:
    """Bytes of the stage with layers [first, last)."""
    begins, ends = first == 0, last == len(need.layer_bytes)
    own = (need.embed_bytes if begins else 0) + (need.head_bytes if ends else 0)
    own -= need.embed_bytes if need.tied and begins and ends else 0
    return need.stage_bytes + sum(need.layer_bytes[first:last]) + own
