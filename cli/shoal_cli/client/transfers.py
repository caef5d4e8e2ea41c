"""How weights move: pausing, resuming and cancelling downloads, and how fast nodes may send and take."""

from __future__ import annotations

import argparse
from typing import Any

import msgspec

from shoal_cli.client.answers import Anything, ConfiguredRow, ControlledRow, DisksAnswer
from shoal_cli.client.disks import Said, only_meant, rows, where
from shoal_cli.client.gateway import Gateway
from shoal_cli.sizes import parse_rate, show_rate
from shoal_common.errors import BadInput
from shoal_common.names import ModelRef, check_node

_SETTINGS = {
    "max_upload": "max_upload_bytes_per_s",
    "max_hub": "max_hub_bytes_per_s",
    "max_peer": "max_peer_bytes_per_s",
}
_WORDS = {
    "paused": "is paused; its bytes are kept, and `shoal resume {model}` lets it go on",
    "was_paused": "was paused already",
    "resumed": "goes on",
    "under_way": "is under way",
    "unknown": "is not being downloaded",
    "rejected": "was rejected, and is not tried again by itself: `shoal pull {model}`",
    "failed": "has failed: `shoal pull {model}` tries again",
}


def control(gateway: Gateway, verb: str, args: argparse.Namespace) -> Said:
    """`shoal pause`, `shoal resume` and `shoal cancel`."""
    model = str(ModelRef.parse(args.model)) if args.model else ""
    body: dict[str, Any] = {"model": model}
    if args.everywhere or args.nodes:
        body["nodes"] = "all" if args.everywhere else [check_node(n) for n in args.nodes]
    answer = gateway.post(f"/v1/downloads/{verb}", body, Anything)
    words = []
    for node, row in rows(answer, ControlledRow):
        if verb == "cancel":
            done = "withdrawn, and its bytes are given back" if row.cancelled else now_words(model, row.was)
            words.append(f"{node}: {model} {done}")
        words += [f"{node}: {name} {now_words(name, now)}" for name, now in sorted(row.models.items())]
        if verb != "cancel" and not row.models:
            words.append(f"{node}: nothing is being downloaded")
    return Said(answer, words or [f"no download of {model} is under way" if model else "no download is under way"])


def now_words(model: str, now: str) -> str:
    """What a download is now, in words. Pure."""
    return _WORDS.get(now, f"is {now}").format(model=model)


def transfer(gateway: Gateway, args: argparse.Namespace) -> Said:
    """`shoal transfer`, with what stands after it."""
    return _set(gateway, args) if getattr(args, "action", None) == "set" else _show(gateway, args)


def _show(gateway: Gateway, args: argparse.Namespace) -> Said:
    answer = only_meant(gateway.get("/v1/storage", Anything), args)
    words = []
    for row in msgspec.convert(answer, DisksAnswer).nodes:
        if row.storage is not None:
            s = row.storage
            words.append(
                rate_words(row.node, s.max_upload_bytes_per_s, s.max_hub_bytes_per_s, s.max_peer_bytes_per_s)
            )
            words += [f"  the environment holds {n}" for n in s.from_environment if n in _SETTINGS.values()]
    return Said(answer, words)


def _set(gateway: Gateway, args: argparse.Namespace) -> Said:
    body = where(args)
    given = {name: getattr(args, option) for option, name in _SETTINGS.items() if getattr(args, option) is not None}
    if not given:
        raise BadInput("nothing to set: give --max-upload, --max-hub or --max-peer")
    body |= {name: parse_rate(text) for name, text in given.items()}
    answer = gateway.put("/v1/storage/config", body, Anything)
    words = [
        rate_words(node, row.max_upload_bytes_per_s, row.max_hub_bytes_per_s, row.max_peer_bytes_per_s)
        for node, row in rows(answer, ConfiguredRow)
    ]
    return Said(answer, words)


def rate_words(node: str, upload: int | None, hub: int | None, peer: int | None) -> str:
    """A node's limits on one line. Pure."""
    return f"{node}: upload {show_rate(upload)}, from the hub {show_rate(hub)}, from each peer {show_rate(peer)}"
