"""NATS: reached or not, refused or not, and whether it is a server that Shoal can live on. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec
from nats.js import api

from shoal_cli.doctor.finding import Finding, listed, or_ok
from shoal_cli.doctor.reaching import System, Trouble, in_words, remedy
from shoal_cli.sizes import show_bytes
from shoal_common.buckets import differences

NATS, STREAMS, ROOM = "nats", "streams", "nats store"
FIRST_WITH_TTL = (2, 11, 0)
"""Keys with a time to live of their own (`allow_msg_ttl`), by which liveness and leases expire."""
MIN_PAYLOAD_BYTES = 1 << 20
"""The largest value that a bucket takes."""
NEARLY_FULL, FULL = 0.8, 0.95

_SERVER = "the machine where NATS runs"


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """One of the servers that this node was told of, and what it said when it was called."""

    url: str
    """Without credentials."""
    trouble: Trouble = ""
    why: str = ""
    version: str = ""
    jetstream: bool = False
    max_payload_bytes: int = MIN_PAYLOAD_BYTES


class Monitor(msgspec.Struct, frozen=True):
    """What the monitoring port of a server on this machine says of JetStream."""

    max_store_bytes: int = 0
    sync_always: bool = False
    sync_interval_s: float = 0.0


class Stream(msgspec.Struct, frozen=True):
    """A stream as it has to be, and as it is."""

    wanted: api.StreamConfig
    found: api.StreamConfig | None = None
    used_bytes: int = 0
    error: str = ""
    """Why it could not be asked for; "" also where there is none."""


class NatsFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What calling NATS has shown."""

    servers: Sequence[Server] = ()
    expected: bool = True
    """Whether one has to be there: our own is not while the node does not run."""
    connected: bool = False
    denied: str = ""
    """Its refusal of our credentials, in its words."""
    forbidden: Sequence[str] = ()
    """What our credentials may not do, in its words."""
    error: str = ""
    """Why being connected came to nothing, beyond these."""
    no_jetstream: str = ""
    store_used_bytes: int | None = None
    store_max_bytes: int = -1
    """A limit of our account; -1: none."""
    monitor: Monitor | None = None
    streams: Sequence[Stream] = ()


def judge(facts: NatsFacts, system: System) -> list[Finding]:
    """What is wrong with it: three checks."""
    if not facts.connected:
        below = [Finding(c, "skipped", "not looked at: NATS is not reached") for c in (STREAMS, ROOM)]
        return _not_connected(facts, system) + below
    found = _server(facts)
    if facts.no_jetstream or not facts.streams:
        why = "JetStream is off" if facts.no_jetstream else facts.error or "it does not answer"
        return found + [Finding(c, "skipped", f"not looked at: {why}") for c in (STREAMS, ROOM)]
    return found + _streams(facts) + _room(facts)


def _not_connected(facts: NatsFacts, system: System) -> list[Finding]:
    shown = ", ".join(s.url for s in facts.servers)
    if facts.denied:
        return [
            Finding(
                NATS,
                "problem",
                f"NATS at {shown} is there, and refuses our credentials ({facts.denied})",
                "the secret here is not that of the cluster: join again with the line that `shoal up` printed on the "
                "node that runs NATS, or set SHOAL_NATS to a URL with the right user or token",
            )
        ]
    if not facts.expected:
        return [Finding(NATS, "skipped", "this node's own NATS runs when the node does: see services")]
    out = []
    for server in facts.servers:
        if server.trouble:
            how = f"NATS at {server.url} is not reached: {in_words(server.trouble, server.why)}"
            address = server.url.rpartition("//")[2]
            out.append(Finding(NATS, "problem", how, remedy(server.trouble, address, system, _SERVER), server.url))
    words = f"NATS at {shown} greets, and connecting fails: {facts.error or 'no reason was given'}"
    return out or [Finding(NATS, "problem", words, "see its log: `shoal logs nats` on the node that runs it")]


def _server(facts: NatsFacts) -> list[Finding]:
    wrong = [
        Finding(
            NATS,
            "warning",
            f"of several servers, {s.url} is not reached: {in_words(s.trouble, s.why)}",
            "start it again, or take it out of `nats` in node.toml (SHOAL_NATS)",
            s.url,
        )
        for s in facts.servers
        if s.trouble
    ]
    for server in (s for s in facts.servers if not s.trouble):
        if server.version and version_of(server.version) < FIRST_WITH_TTL:
            what = f"NATS at {server.url} is {server.version}, which knows no time to live per key"
            least = ".".join(map(str, FIRST_WITH_TTL))
            wrong.append(
                Finding(NATS, "problem", what, f"upgrade it to {least} or later; Shoal brings one", server.url)
            )
        if server.max_payload_bytes < MIN_PAYLOAD_BYTES:
            what = f"NATS at {server.url} takes messages of {show_bytes(server.max_payload_bytes)} at most"
            wrong.append(Finding(NATS, "problem", what, "set max_payload: 1MB in its configuration", server.url))
    if facts.forbidden:
        what = f"our credentials may not do all that Shoal does: {listed(list(facts.forbidden), 2)}"
        wrong.append(
            Finding(NATS, "problem", what, "permit $JS.API.>, $KV.>, shoal.> and _INBOX.> to this user in NATS")
        )
    elif facts.error:
        wrong.append(
            Finding(
                NATS,
                "problem",
                f"NATS is reached, and JetStream does not answer ({facts.error})",
                "is a majority of its servers there, is its disk full? See the log of NATS",
            )
        )
    if facts.no_jetstream:
        remedy_words = "turn it on: `jetstream { store_dir: … }` in its configuration, as deploy/nats has it"
        wrong.append(Finding(NATS, "problem", f"JetStream is not on: {facts.no_jetstream}", remedy_words))
    if facts.monitor is not None and not facts.monitor.sync_always:
        wrong.append(
            Finding(
                NATS,
                "warning",
                f"NATS writes to its disk every {facts.monitor.sync_interval_s:.0f} s: a power cut loses what it has "
                "acknowledged since",
                "set `sync_interval: always` in the jetstream section of its configuration",
            )
        )
    first = next((s for s in facts.servers if not s.trouble), None)
    words = f"{first.url}, version {first.version or 'unknown'}, JetStream on" if first else "reached"
    seen = "" if facts.monitor is None else ", every write synced"
    return or_ok(NATS, wrong, words + seen)


def version_of(text: str) -> tuple[int, ...]:
    """`2.11.0-RC.1` as (2, 11, 0); what is no version is before all."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", text)
    return tuple(map(int, match.groups())) if match else (0, 0, 0)


def _streams(facts: NatsFacts) -> list[Finding]:
    wrong = []
    for stream in facts.streams:
        name = str(stream.wanted.name)
        if stream.error:
            remedy_words = "see what is wrong with NATS above; a stream without a leader does not answer either"
            wrong.append(Finding(STREAMS, "problem", f"{name} does not answer: {stream.error}", remedy_words, name))
        elif stream.found is None:
            words = "any service makes it when it starts: `shoal restart storage` (NATS may have lost its store)"
            wrong.append(Finding(STREAMS, "problem", f"there is no stream {name}", words, f"stream {name}"))
        elif other := differences(stream.wanted, stream.found):
            words = (
                "`shoal restart storage` on a node of this version brings it in line; if NATS refuses that, "
                f"`nats stream rm {name}` and restart every service"
            )
            what = f"stream {name} has other settings: {'; '.join(other)}"
            wrong.append(Finding(STREAMS, "problem", what, words, f"stream {name}"))
    return or_ok(STREAMS, wrong, f"{len(facts.streams)} streams and buckets, with the settings they must have")


def _room(facts: NatsFacts) -> list[Finding]:
    wrong = []
    for stream in facts.streams:
        found = stream.found
        # A stream that discards its oldest is meant to be full.
        if found is None or not (found.max_bytes or 0) > 0 or found.discard == api.DiscardPolicy.OLD:
            continue
        wrong += _fill(f"stream {found.name}", stream.used_bytes, found.max_bytes or 0)
    limits = [facts.store_max_bytes, facts.monitor.max_store_bytes if facts.monitor else -1]
    known = [limit for limit in limits if limit > 0]
    if facts.store_used_bytes is not None and known:
        wrong += _fill("the store of NATS", facts.store_used_bytes, min(known))
    used = "" if facts.store_used_bytes is None else f"{show_bytes(facts.store_used_bytes)} used"
    of = f" of {show_bytes(min(known))}" if known else "; its limit cannot be seen from here"
    return or_ok(ROOM, wrong, used + of)


def _fill(what: str, used_bytes: int, max_bytes: int) -> list[Finding]:
    share = used_bytes / max_bytes
    if share < NEARLY_FULL:
        return []
    words = f"{what} is {100 * share:.0f} % full: {show_bytes(used_bytes)} of {show_bytes(max_bytes)}"
    then = "then writes are refused: raise max_file_store, or remove streams that are not Shoal's"
    if what.startswith("stream"):
        then = f"then writes are refused: `nats stream subjects {what.removeprefix('stream ')}` shows what fills it"
    return [Finding(ROOM, "problem" if share >= FULL else "warning", words, then, what)]
