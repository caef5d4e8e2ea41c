"""The storage service: builds its parts and maps subjects to handlers."""

from __future__ import annotations

import asyncio
import time

from shoal_common.bus.keys import storage_key
from shoal_common.messages.leases import AskLease, Unlease
from shoal_common.messages.liveness import Facts
from shoal_common.messages.storage import (
    AskManifest,
    AskPlan,
    AskRoom,
    CollectGarbage,
    CommitBlob,
    Configure,
    Delete,
    NoteUse,
    Pin,
    Release,
    Reserve,
    SealModel,
    SealPart,
    Verify,
)
from shoal_common.rpc.command_worker import Verb
from shoal_common.rpc.request_reply import Question
from shoal_common.service import Context
from shoal_storage.eviction.disk_full import Full, told
from shoal_storage.handlers.configure import CONFIGURE_DEADLINE_S, Settings
from shoal_storage.handlers.deletion import DELETE_DEADLINE_S
from shoal_storage.handlers.fetch import Guard
from shoal_storage.handlers.maintenance import UPKEEP_DEADLINE_S, Upkeep
from shoal_storage.handlers.reservations import Reservations
from shoal_storage.handlers.verify import VERIFY_DEADLINE_S, Verifier
from shoal_storage.integrity.consequences import Losses, forget_useless
from shoal_storage.integrity.quarantine import set_aside_earlier
from shoal_storage.integrity.repair import repairable
from shoal_storage.leases import lease_files
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.libraries.scanner import refuse_overlap
from shoal_storage.libraries.service import Adoption
from shoal_storage.publisher import Announcer
from shoal_storage.scan.reconciler import Rescan
from shoal_storage.scan.unverified import Prover
from shoal_storage.scan.watcher import Watcher
from shoal_storage.settings import Limits, read_limits, read_reserve_bytes
from shoal_storage.startup import recover
from shoal_storage.store.store import Disk
from shoal_storage.volume_manager import Joining, open_all


async def _announcer(
    context: Context, tasks: asyncio.TaskGroup, disk: Disk, ledger: Ledger, limits: Limits
) -> Announcer:
    published = await context.view(tasks, "state", f"*.{context.node}.>")
    disk_state = await context.view(tasks, "state", storage_key(context.node))
    return Announcer(context, disk, ledger, limits, published, disk_state)


async def run(context: Context) -> None:
    """Run the storage service until it is told to stop."""
    limits = read_limits(context.config.settings, context.environ)
    await asyncio.to_thread(refuse_overlap, limits.read_only_roots, context.config.store)
    disk = Disk(context.config.store, read_reserve_bytes(context.config.settings, context.environ))
    with told("open its store"):
        await asyncio.to_thread(disk.open)
    volume_errors = await asyncio.to_thread(open_all, disk, limits)
    ledger = await _read(disk)
    async with asyncio.TaskGroup() as tasks:
        specs = await context.view(tasks, "spec")
        downloads = await context.view(tasks, "state", f"download.{context.node}.>")
        live = await context.view(tasks, "live", f"{context.node}.>")
        announcer = await _announcer(context, tasks, disk, ledger, limits)
        guard = Guard(context, disk, ledger, limits, specs, announcer)
        await asyncio.to_thread(guard.keeping.read)
        losses = Losses(context, disk, ledger, specs, announcer)
        rescan = Rescan(context, disk, ledger, guard.section, guard.keeping, announcer, losses, guard.parts)
        joining = Joining(disk, ledger, guard.section, announcer, rescan, limits, volume_errors)
        adoption = Adoption(context, disk, ledger, guard.section, announcer, limits.read_only_roots)
        first_scan = await adoption.start()
        await announcer.announce_all()

        async def use(limits: Limits) -> None:
            guard.use_limits(limits)
            await joining.use(limits)
            await adoption.use_roots(limits.read_only_roots)

        settings = Settings(context, disk, ledger, limits, use, announcer.publish, joining.refuse_unusable)
        context.background(tasks, first_scan)
        context.background(tasks, adoption.look_regularly())
        context.background(tasks, adoption.hash_what_waits())
        context.background(tasks, guard.say_again_after_reconnects())
        context.background(tasks, guard.say_again_what_is_taken())
        context.background(tasks, guard.holders.watch())
        full = Full(context, disk, ledger, guard.section, guard.room, announcer)
        context.background(tasks, full.watch())
        reservations = Reservations(
            context,
            ledger,
            guard.section,
            guard.keeping,
            guard.removal,
            guard.parts,
            announcer,
            lambda: guard.room.limits,
            specs,
            downloads,
            live,
        )
        context.background(tasks, reservations.watch())
        upkeep = Upkeep(context, ledger, guard.section, guard.room, guard.keeping, announcer)
        context.background(tasks, upkeep.keep_uses())
        prover = Prover(disk, ledger, guard.section, rescan)
        context.background(tasks, prover.prove_forever())
        context.background(tasks, Watcher(disk.layout, rescan).watch_forever())
        context.background(tasks, joining.watch())
        verifier = Verifier(context, disk, ledger, guard.section, losses, prover, announcer, adoption.doubted)
        context.background(tasks, verifier.verify_slowly())
        tasks.create_task(_stop_hashing(context, disk))
        tasks.create_task(
            context.serve(
                {
                    "reserve": Question(Reserve, full.guarded("reserve", guard.reserve)),
                    "release": Question(Release, guard.release),
                    "commit": Question(CommitBlob, full.guarded("commit a blob", guard.commit)),
                    "seal": Question(SealModel, full.guarded("seal a model", guard.seal)),
                    "seal_part": Question(SealPart, full.guarded("record a shard", guard.parts.seal)),
                    "manifest": Question(AskManifest, guard.manifest),
                    "lease": Question(AskLease, full.guarded("make a view for a lease", guard.holders.lease)),
                    "unlease": Question(Unlease, guard.holders.unlease),
                    "plan": Question(AskPlan, upkeep.plan),
                    "room": Question(AskRoom, full.room),
                    "used": Question(NoteUse, upkeep.used),
                }
            )
        )
        tasks.create_task(
            context.work(
                {
                    "delete": Verb(Delete, guard.removal.delete, DELETE_DEADLINE_S),
                    "pin": Verb(Pin, upkeep.pin, UPKEEP_DEADLINE_S),
                    "gc": Verb(CollectGarbage, upkeep.collect_garbage, UPKEEP_DEADLINE_S),
                    "configure": Verb(Configure, settings.configure, CONFIGURE_DEADLINE_S),
                    "verify": Verb(Verify, verifier.verify, VERIFY_DEADLINE_S),
                }
            )
        )
        context.ready(Facts(disk_free_bytes=await asyncio.to_thread(disk.free_bytes)))
    await upkeep.write_uses()
    await adoption.remember()


async def _read(disk: Disk) -> Ledger:
    """Read what the disk holds, after finishing what a crash interrupted."""
    leases = await asyncio.to_thread(lease_files.read, disk, time.monotonic(), time.time())
    ledger = await asyncio.to_thread(recover, disk, leases)
    ledger.quarantined = await asyncio.to_thread(set_aside_earlier, disk)
    ledger.repairable = await asyncio.to_thread(repairable, disk, ledger.quarantined)
    await forget_useless(disk, ledger)
    return ledger


async def _stop_hashing(context: Context, disk: Disk) -> None:
    await context.stopping.wait()
    disk.stopping.set()
