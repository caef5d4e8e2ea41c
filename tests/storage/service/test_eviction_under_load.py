"""Fifty requests at once on a real disk: limits hold, protected models stay, a deletion frees what it says."""

from __future__ import annotations

import asyncio
import random
import secrets
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal_common.errors import InUse, NotFound, QuotaExceeded, ShoalError
from shoal_common.messages.downloads import StopDownloads
from shoal_common.messages.envelope import Empty
from shoal_common.messages.manifest import Manifest
from shoal_common.messages.storage import (
    CollectGarbage,
    CommitBlob,
    Delete,
    EvictionPlan,
    Pin,
    PlanEviction,
    RecordUse,
    Release,
    Reserve,
    SealModel,
)
from shoal_common.names import ModelId
from shoal_common.rpc.request_reply import RpcEndpoint, serve
from shoal_common.settings.node import StorageSettings
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.section import CriticalSection, Held
from tests.harness.nats import NatsServer
from tests.storage.service.test_eviction_machine import MODELS
from tests.storage.storage_parts import StorageParts, storage_parts
from tests.storage.store_fixtures import Model, check_invariants, put

CONCURRENT = 50
ROUNDS = 4
EXPECTED = (QuotaExceeded, NotFound, InUse)
WEIGHTS = {"pull": 20, "reserve": 2, "commit": 3, "seal": 3, "release": 4, "delete": 3, "pin": 1, "unpin": 4}
WEIGHTS |= {"used": 4, "gc": 2, "plan": 4}
COMING_IN = ("pull", "reserve", "commit", "seal")
issued = Counter[str]()


class Watched(CriticalSection):
    """The critical section: each holder leaves a ledger that keeps the limits."""

    def __init__(self, ledger: Ledger, limits: StorageSettings) -> None:
        super().__init__()
        self.ledger, self.limits = ledger, limits
        self.broken = ""

    async def __aexit__(self, *error: Any) -> None:
        self.broken = self.broken or violations(self.ledger, self.limits)
        await super().__aexit__(*error)


def violations(ledger: Ledger, limits: StorageSettings) -> str:
    """The violation of I3 or I4 in a ledger, or ""."""
    if limits.quota_bytes is not None and ledger.used_bytes + ledger.reserved_bytes > limits.quota_bytes:
        return f"I3: {ledger.used_bytes} + {ledger.reserved_bytes} > {limits.quota_bytes}"
    if unpinned := ledger.uses.pinned - ledger.stored_manifests.keys():
        return f"I4: pinned, and gone: {unpinned}"
    for manifest in ledger.manifests.values():
        if gone := manifest.blob_sizes.keys() - ledger.blobs.keys():
            return f"I4: blobs of {manifest.model} are gone: {gone}"
    for model, blobs in ledger.arrivals.reservations.items():
        if gone := blobs - ledger.blobs.keys() - ledger.arrivals.partials.keys():
            return f"I4: what the fetch of {model} counts on is gone: {gone}"
    return ""


class Together:
    """One store with many concurrent requests."""

    def __init__(self, parts: StorageParts) -> None:
        self.parts = parts
        self._carry_out, self._delete_model = parts.evictions._execute, parts.deleter.delete_model
        parts.evictions._execute = self.carry_out  # type: ignore[method-assign]  # the same, checked
        parts.deleter.delete_model = self.delete_model  # type: ignore[method-assign]  # the same, measured

    def blob_bytes(self) -> int:
        return sum(p.stat().st_size for p in self.parts.disk.layout.blobs.glob("*/*"))

    async def carry_out(self, eviction: EvictionPlan, admitted: Manifest | None = None) -> EvictionPlan:
        """Check a plan, and count it."""
        ledger = self.parts.ledger
        kept = ledger.uses.pinned | (ledger.arrivals.reservations.keys() - ledger.arrivals.ended_reservations)
        assert not kept & {v.model for v in eviction.victims}, "I4: a victim is kept"
        issued["evictions"] += 1
        return await self._carry_out(eviction, admitted)

    async def delete_model(self, held: Held, model: ModelId) -> int:
        """Compare what a deletion has freed, by the files, with what it returns."""
        is_arriving = any(model in p.models for p in self.parts.ledger.arrivals.partials.values())
        before = self.blob_bytes()
        freed = await self._delete_model(held, model)
        assert before - self.blob_bytes() == freed or is_arriving
        return freed

    async def ask(self, verb: str, model: Model) -> None:
        """One request, which may be refused only for what others have done meanwhile."""
        issued[verb] += 1
        try:
            await (self._bring_in(verb, model) if verb in COMING_IN else self._keep(verb, model))
        except EXPECTED:
            issued["refused"] += 1
        except ShoalError as e:
            raise AssertionError(f"{verb} of {model.name}: {e.code}: {e.message}") from e

    async def _bring_in(self, verb: str, model: Model) -> None:
        fetch, ledger = self.parts.fetch, self.parts.ledger
        if verb in ("pull", "reserve"):
            await fetch.reserve(Reserve(manifest=model.manifest))
        if verb in ("pull", "commit"):
            for blob, data in model.blobs.items():
                # As the one fetcher of a node: it stops writing to a blob once it has asked for its commit.
                if blob in ledger.arrivals.partials and not (self.parts.disk.layout.partial(blob) / "have").exists():
                    with suppress(FileNotFoundError):
                        put(self.parts.disk.layout, blob, data)
                await fetch.commit(CommitBlob(blob=blob))
        if verb in ("pull", "seal"):
            await fetch.seal(SealModel(manifest=model.sealed))

    async def _keep(self, verb: str, model: Model) -> None:
        repo, maintenance = model.manifest.repo, self.parts.maintenance
        asked: dict[str, Callable[[], Awaitable[object]]] = {
            "release": lambda: self.parts.fetch.release(Release(model=model.name, blobs=list(model.blobs))),
            "delete": lambda: self.parts.delete_command.delete(Delete(model=repo), ""),
            "pin": lambda: maintenance.pin(Pin(model=repo), ""),
            "unpin": lambda: maintenance.pin(Pin(model=repo, pinned=False), ""),
            "used": lambda: maintenance.record_use(RecordUse(models=[model.name])),
            "gc": lambda: maintenance.collect_garbage(CollectGarbage(), ""),
            "plan": lambda: maintenance.plan(PlanEviction(need_bytes=300)),
        }
        await asked[verb]()


async def live(server: NatsServer, home: Path, node: str, limits: StorageSettings, seed: int) -> None:
    """Rounds of requests, each in its own order, with a check of the disk after each."""
    draw = random.Random(seed)

    async def withdraw(_: StopDownloads) -> Empty:
        return Empty()

    async with storage_parts(server, home, node, limits) as parts:
        section = parts.context.section = Watched(parts.ledger, limits)
        together, stopping = Together(parts), asyncio.Event()
        serving = asyncio.create_task(
            serve(
                parts.here.nats, "fetcher", node, {"stop_downloads": RpcEndpoint(StopDownloads, withdraw)}, stopping
            )
        )
        try:
            for model in MODELS[3:5]:  # no quota used here has space for both of these
                await together.ask("pull", model)
            for _ in range(ROUNDS):
                asked = list(
                    zip(
                        draw.choices([*WEIGHTS], [*WEIGHTS.values()], k=CONCURRENT),
                        draw.choices(MODELS, k=CONCURRENT),
                        strict=True,
                    )
                )
                await asyncio.gather(*(together.ask(verb, model) for verb, model in asked))
                assert not section.broken, section.broken
                assert together.blob_bytes() == parts.ledger.used_bytes, "the ledger says what the disk holds"
                on_disk = {p.name for p in parts.disk.layout.partials.iterdir()}
                assert on_disk == parts.ledger.arrivals.partials.keys()
                check_invariants(parts.disk.layout.root)
        finally:
            stopping.set()
            await serving


@pytest.mark.parametrize("steps", [200, pytest.param(10_000, marks=pytest.mark.long)])
def test_I3_I4_fifty_requests_at_once_keep_limits_and_protected(nats: NatsServer, steps: int) -> None:
    issued.clear()

    @settings(
        max_examples=-(-steps // (CONCURRENT * ROUNDS)),
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(st.integers(700, 1000), st.integers(0, 2**32))
    def lives(quota_bytes: int, seed: int) -> None:
        with tempfile.TemporaryDirectory(prefix="shoal-together-") as home:
            node = f"together-{secrets.token_hex(6)}"
            asyncio.run(live(nats, Path(home), node, StorageSettings(quota_bytes, 0, "lru"), seed))

    lives()
    print(dict(issued))  # with `-s`: requests issued, requests refused, and how often models were evicted
    assert sum(issued[verb] for verb in WEIGHTS) >= steps and issued["evictions"] >= steps // (CONCURRENT * ROUNDS)
