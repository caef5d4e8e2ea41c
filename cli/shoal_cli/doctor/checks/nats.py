"""NATS: whether it can be reached, accepts our credentials, and is configured as Shoal needs it. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec
from nats.js import api

from shoal_cli.doctor.finding import Finding, join_names, or_ok
from shoal_cli.doctor.reachability import ConnectError, OsInfo, connect_remedy, describe
from shoal_common.bus.streams import config_mismatches
from shoal_common.units import format_bytes

NATS, STREAMS, NATS_STORE = "nats", "streams", "nats store"
MIN_VERSION = (2, 11, 0)
"""The first with per-key TTL (`allow_msg_ttl`), by which liveness records and leases expire."""
MIN_PAYLOAD_BYTES = 1 << 20
"""The largest value in a bucket."""
WARNING_SHARE, PROBLEM_SHARE = 0.8, 0.95

_NATS_MACHINE = "the machine where NATS runs"


class NatsServerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One of this node's NATS servers, and its answer to a connection."""

    url: str
    """Without credentials."""
    connect_error: ConnectError = ""
    reason: str = ""
    version: str = ""
    jetstream: bool = False
    max_payload_bytes: int = MIN_PAYLOAD_BYTES


class JetStreamSettings(msgspec.Struct, frozen=True):
    """JetStream's settings, from the configuration of this node's own server."""

    max_store_bytes: int = 0
    sync_always: bool = False
    sync_interval_s: float = 0.0


class StreamStatus(msgspec.Struct, frozen=True):
    """A stream as it must be, and as it is."""

    expected: api.StreamConfig
    actual: api.StreamConfig | None = None
    used_bytes: int = 0
    error: str = ""
    """Why it could not be read; "" also where it does not exist."""


class NatsFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What connecting to NATS showed."""

    servers: Sequence[NatsServerInfo] = ()
    expected: bool = True
    """Whether one must run: the node's own does not while the node is down."""
    connected: bool = False
    denied: str = ""
    """Its refusal of our credentials, verbatim."""
    is_foreign: bool = False
    """Its certificate is of another cluster than this node's."""
    forbidden: Sequence[str] = ()
    """What our credentials may not do, verbatim."""
    error: str = ""
    """Any other reason why NATS could not be used."""
    no_jetstream: str = ""
    store_used_bytes: int | None = None
    store_max_bytes: int = -1
    """A limit of our account; -1: none."""
    settings: JetStreamSettings | None = None
    streams: Sequence[StreamStatus] = ()


def check(facts: NatsFacts, system: OsInfo) -> list[Finding]:
    """Return what is wrong with it: three checks."""
    if not facts.connected:
        skipped = [Finding(c, "skipped", "not checked: NATS cannot be reached") for c in (STREAMS, NATS_STORE)]
        return _not_connected(facts, system) + skipped
    findings = _server(facts)
    if facts.no_jetstream or not facts.streams:
        reason = "JetStream is off" if facts.no_jetstream else facts.error or "it does not answer"
        return findings + [Finding(c, "skipped", f"not checked: {reason}") for c in (STREAMS, NATS_STORE)]
    return findings + _streams(facts) + _store(facts)


def _not_connected(facts: NatsFacts, system: OsInfo) -> list[Finding]:
    urls = ", ".join(s.url for s in facts.servers)
    if facts.denied:
        return [
            Finding(
                NATS,
                "problem",
                f"NATS at {urls} refuses our credentials ({facts.denied})",
                "this node was revoked, or its keys are of another cluster: run `shoal leave`, then `shoal join` "
                "with a code that `shoal invite` prints on the cluster's first node",
            )
        ]
    if facts.is_foreign:
        return [
            Finding(
                NATS,
                "problem",
                f"NATS at {urls} is the server of another cluster than the one that this node has joined",
                "start this node's cluster on its first machine, or correct `nats` in node.toml (SHOAL_NATS); to "
                "join that other cluster: `shoal leave`, then `shoal join`",
            )
        ]
    if not facts.expected:
        return [Finding(NATS, "skipped", "this node's own NATS runs only while the node does: see services")]
    out = []
    for server in facts.servers:
        if server.connect_error:
            what = f"NATS at {server.url} cannot be reached: {describe(server.connect_error, server.reason)}"
            address = server.url.rpartition("//")[2]
            out.append(
                Finding(
                    NATS,
                    "problem",
                    what,
                    connect_remedy(server.connect_error, address, system, _NATS_MACHINE),
                    server.url,
                )
            )
    what = f"NATS at {urls} answers, but connecting fails: {facts.error or 'no reason given'}"
    return out or [Finding(NATS, "problem", what, "see its log: `shoal logs nats` on the node that runs it")]


def _server(facts: NatsFacts) -> list[Finding]:
    wrong = [
        Finding(
            NATS,
            "warning",
            f"of several servers, {s.url} cannot be reached: {describe(s.connect_error, s.reason)}",
            "start it again, or remove it from `nats` in node.toml (SHOAL_NATS)",
            s.url,
        )
        for s in facts.servers
        if s.connect_error
    ]
    for server in (s for s in facts.servers if not s.connect_error):
        if server.version and version_of(server.version) < MIN_VERSION:
            what = f"NATS at {server.url} is {server.version}, which has no per-key TTL"
            least = ".".join(map(str, MIN_VERSION))
            wrong.append(
                Finding(NATS, "problem", what, f"upgrade it to {least} or later; Shoal includes one", server.url)
            )
        if server.max_payload_bytes < MIN_PAYLOAD_BYTES:
            what = f"NATS at {server.url} accepts messages of at most {format_bytes(server.max_payload_bytes)}"
            wrong.append(Finding(NATS, "problem", what, "set max_payload: 1MB in its configuration", server.url))
    if facts.forbidden:
        what = f"our credentials lack permissions that Shoal needs: {join_names(list(facts.forbidden), 2)}"
        wrong.append(
            Finding(NATS, "problem", what, "allow $JS.API.>, $KV.>, shoal.> and _INBOX.> for this user in NATS")
        )
    elif facts.error:
        wrong.append(
            Finding(
                NATS,
                "problem",
                f"NATS answers, but JetStream does not ({facts.error})",
                "is a majority of its servers up, is its disk full? See the log of NATS",
            )
        )
    if facts.no_jetstream:
        remedy = "turn it on: `jetstream { store_dir: … }` in its configuration, as in deploy/nats"
        wrong.append(Finding(NATS, "problem", f"JetStream is off: {facts.no_jetstream}", remedy))
    if facts.settings is not None and not facts.settings.sync_always:
        wrong.append(
            Finding(
                NATS,
                "warning",
                f"NATS syncs its disk every {facts.settings.sync_interval_s:.0f} s: a power cut loses what it "
                "acknowledged since",
                "set `sync_interval: always` in the jetstream section of its configuration",
            )
        )
    first = next((s for s in facts.servers if not s.connect_error), None)
    what = f"{first.url}, version {first.version or 'unknown'}, JetStream on" if first else "reached"
    synced = "" if facts.settings is None else ", every write synced"
    return or_ok(NATS, wrong, what + synced)


def version_of(text: str) -> tuple[int, ...]:
    """Return `2.11.0-RC.1` as (2, 11, 0), and (0, 0, 0) for what is no version."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", text)
    return tuple(map(int, match.groups())) if match else (0, 0, 0)


def _streams(facts: NatsFacts) -> list[Finding]:
    wrong = []
    for stream in facts.streams:
        name = str(stream.expected.name)
        if stream.error:
            remedy = "see what is wrong with NATS; a stream without a leader does not answer either"
            wrong.append(Finding(STREAMS, "problem", f"{name} does not answer: {stream.error}", remedy, name))
        elif stream.actual is None:
            remedy = "any service creates it at its start: `shoal restart storage` (NATS may have lost its store)"
            wrong.append(Finding(STREAMS, "problem", f"there is no stream {name}", remedy, f"stream {name}"))
        elif other := config_mismatches(stream.expected, stream.actual):
            remedy = (
                "`shoal restart storage` on a node of this version corrects it; if NATS refuses, run "
                f"`nats stream rm {name}` and restart all services"
            )
            what = f"stream {name} has other settings: {'; '.join(other)}"
            wrong.append(Finding(STREAMS, "problem", what, remedy, f"stream {name}"))
    return or_ok(STREAMS, wrong, f"{len(facts.streams)} streams and buckets, all with the right settings")


def _store(facts: NatsFacts) -> list[Finding]:
    wrong = []
    for stream in facts.streams:
        actual = stream.actual
        # A stream that discards its oldest messages is meant to be full.
        if actual is None or not (actual.max_bytes or 0) > 0 or actual.discard == api.DiscardPolicy.OLD:
            continue
        wrong += _fill(f"stream {actual.name}", stream.used_bytes, actual.max_bytes or 0)
    bounds = [facts.store_max_bytes, facts.settings.max_store_bytes if facts.settings else -1]
    known = [bound for bound in bounds if bound > 0]
    if facts.store_used_bytes is not None and known:
        wrong += _fill("NATS's store", facts.store_used_bytes, min(known))
    used = "" if facts.store_used_bytes is None else f"{format_bytes(facts.store_used_bytes)} used"
    limit = f" of {format_bytes(min(known))}" if known else "; its limit is not visible from here"
    return or_ok(NATS_STORE, wrong, used + limit)


def _fill(what: str, used_bytes: int, max_bytes: int) -> list[Finding]:
    share = used_bytes / max_bytes
    if share < WARNING_SHARE:
        return []
    text = f"{what} is {100 * share:.0f} % full: {format_bytes(used_bytes)} of {format_bytes(max_bytes)}"
    remedy = "at 100 % writes are refused: raise max_file_store, or remove streams that are not Shoal's"
    if what.startswith("stream"):
        remedy = (
            f"at 100 % writes are refused: `nats stream subjects {what.removeprefix('stream ')}` shows what fills it"
        )
    return [Finding(NATS_STORE, "problem" if share >= PROBLEM_SHARE else "warning", text, remedy, what)]
