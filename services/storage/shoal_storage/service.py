"""The storage service: builds its parts and maps subjects to handlers."""

from __future__ import annotations

import asyncio
import time

from shoal_common.bus.keys import storage_key
from shoal_common.messages.leases import AcquireLease, ReleaseLease
from shoal_common.messages.liveness import NodeFacts
from shoal_common.messages.storage import (
    CheckSpace,
    CollectGarbage,
    CommitBlob,
    Configure,
    Delete,
    GetManifest,
    Pin,
    PlanEviction,
    RecordUse,
    Release,
    Reserve,
    SealModel,
    SealShard,
    Verify,
)
from shoal_common.rpc.command_worker import CommandHandler
from shoal_common.rpc.request_reply import RpcEndpoint
from shoal_common.service import ServiceContext
from shoal_storage.eviction.disk_full import DiskFullHandler, map_disk_full
from shoal_storage.handlers.configure import CONFIGURE_DEADLINE_S, ConfigureCommand
from shoal_storage.handlers.deletion import DELETE_DEADLINE_S
from shoal_storage.handlers.fetch import FetchApi
from shoal_storage.handlers.maintenance import MAINTENANCE_DEADLINE_S, MaintenanceApi
from shoal_storage.handlers.reservations import ReservationExpiry
from shoal_storage.handlers.verify import VERIFY_DEADLINE_S, Verifier
from shoal_storage.integrity.consequences import IntegrityPublisher, drop_obsolete_quarantine
from shoal_storage.integrity.quarantine import quarantined_blobs
from shoal_storage.integrity.repair import repairable_blobs
from shoal_storage.leases import lease_files
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.libraries.scanner import reject_overlap
from shoal_storage.libraries.service import LibraryService
from shoal_storage.publisher import StatePublisher
from shoal_storage.scan.reconciler import StoreReconciler
from shoal_storage.scan.unverified import UnverifiedBlobHasher
from shoal_storage.scan.watcher import StoreWatcher
from shoal_storage.settings import StorageSettings, read_ballast_bytes, read_settings
from shoal_storage.startup import recover_store
from shoal_storage.store.store import Store
from shoal_storage.volume_manager import VolumeManager, open_volumes


async def _announcer(
    context: ServiceContext, tasks: asyncio.TaskGroup, disk: Store, ledger: Ledger, limits: StorageSettings
) -> StatePublisher:
    published = await context.mirror(tasks, "state", f"*.{context.node}.>")
    disk_state = await context.mirror(tasks, "state", storage_key(context.node))
    return StatePublisher(context, disk, ledger, limits, published, disk_state)


async def run(context: ServiceContext) -> None:
    """Run the storage service until it is told to stop."""
    limits = read_settings(context.config.settings, context.environ)
    await asyncio.to_thread(reject_overlap, limits.libraries, context.config.store)
    disk = Store(context.config.store, read_ballast_bytes(context.config.settings, context.environ))
    with map_disk_full("open its store"):
        await asyncio.to_thread(disk.open)
    volume_errors = await asyncio.to_thread(open_volumes, disk, limits)
    ledger = await _read(disk)
    async with asyncio.TaskGroup() as tasks:
        specs = await context.mirror(tasks, "spec")
        downloads = await context.mirror(tasks, "state", f"download.{context.node}.>")
        live = await context.mirror(tasks, "live", f"{context.node}.>")
        announcer = await _announcer(context, tasks, disk, ledger, limits)
        guard = FetchApi(context, disk, ledger, limits, specs, announcer)
        await asyncio.to_thread(guard.metadata.read)
        losses = IntegrityPublisher(context, disk, ledger, specs, announcer)
        rescan = StoreReconciler(
            context, disk, ledger, guard.section, guard.metadata, announcer, losses, guard.shards
        )
        joining = VolumeManager(disk, ledger, guard.section, announcer, rescan, limits, volume_errors)
        adoption = LibraryService(context, disk, ledger, guard.section, announcer, limits.libraries)
        first_scan = await adoption.start()
        await announcer.publish_all()

        async def use(limits: StorageSettings) -> None:
            guard.apply_settings(limits)
            await joining.use_settings(limits)
            await adoption.use_libraries(limits.libraries)

        settings = ConfigureCommand(
            context, disk, ledger, limits, use, announcer.publish_storage, joining.reject_unusable
        )
        context.run_in_background(tasks, first_scan)
        context.run_in_background(tasks, adoption.scan_forever())
        context.run_in_background(tasks, adoption.hash_forever())
        context.run_in_background(tasks, guard.republish_after_reconnects())
        context.run_in_background(tasks, guard.republish_removed_keys())
        context.run_in_background(tasks, guard.leases.expire_forever())
        full = DiskFullHandler(context, disk, ledger, guard.section, guard.evictions, announcer)
        context.run_in_background(tasks, full.check_forever())
        reservations = ReservationExpiry(
            context,
            ledger,
            guard.section,
            guard.metadata,
            guard.deletions,
            guard.shards,
            announcer,
            lambda: guard.evictions.settings,
            specs,
            downloads,
            live,
        )
        context.run_in_background(tasks, reservations.check_forever())
        upkeep = MaintenanceApi(context, ledger, guard.section, guard.evictions, guard.metadata, announcer)
        context.run_in_background(tasks, upkeep.write_uses_forever())
        prover = UnverifiedBlobHasher(disk, ledger, guard.section, rescan)
        context.run_in_background(tasks, prover.hash_forever())
        context.run_in_background(tasks, StoreWatcher(disk.layout, rescan).watch_forever())
        context.run_in_background(tasks, joining.watch_forever())
        verifier = Verifier(context, disk, ledger, guard.section, losses, prover, announcer, adoption.handle_bad_blob)
        context.run_in_background(tasks, verifier.scrub_forever())
        tasks.create_task(_stop_hashing(context, disk))
        tasks.create_task(
            context.serve(
                {
                    "reserve": RpcEndpoint(Reserve, full.with_disk_full_retry("reserve", guard.reserve)),
                    "release": RpcEndpoint(Release, guard.release),
                    "commit": RpcEndpoint(CommitBlob, full.with_disk_full_retry("commit a blob", guard.commit)),
                    "seal": RpcEndpoint(SealModel, full.with_disk_full_retry("seal a model", guard.seal)),
                    "seal_shard": RpcEndpoint(
                        SealShard, full.with_disk_full_retry("record a shard", guard.shards.seal)
                    ),
                    "manifest": RpcEndpoint(GetManifest, guard.manifest),
                    "lease": RpcEndpoint(
                        AcquireLease, full.with_disk_full_retry("make a view for a lease", guard.leases.lease)
                    ),
                    "release_lease": RpcEndpoint(ReleaseLease, guard.leases.unlease),
                    "plan": RpcEndpoint(PlanEviction, upkeep.plan),
                    "check_space": RpcEndpoint(CheckSpace, full.check_space),
                    "record_use": RpcEndpoint(RecordUse, upkeep.record_use),
                }
            )
        )
        tasks.create_task(
            context.run_commands(
                {
                    "delete": CommandHandler(Delete, guard.deletions.delete, DELETE_DEADLINE_S),
                    "pin": CommandHandler(Pin, upkeep.pin, MAINTENANCE_DEADLINE_S),
                    "gc": CommandHandler(CollectGarbage, upkeep.collect_garbage, MAINTENANCE_DEADLINE_S),
                    "configure": CommandHandler(Configure, settings.configure, CONFIGURE_DEADLINE_S),
                    "verify": CommandHandler(Verify, verifier.verify, VERIFY_DEADLINE_S),
                }
            )
        )
        context.ready(NodeFacts(disk_free_bytes=await asyncio.to_thread(disk.free_bytes)))
    await upkeep.write_uses()
    await adoption.save_hashes()


async def _read(disk: Store) -> Ledger:
    """Read what the disk holds, after finishing what a crash interrupted."""
    leases = await asyncio.to_thread(lease_files.read_leases, disk, time.monotonic(), time.time())
    ledger = await asyncio.to_thread(recover_store, disk, leases)
    ledger.quarantined = await asyncio.to_thread(quarantined_blobs, disk)
    ledger.repairable = await asyncio.to_thread(repairable_blobs, disk, ledger.quarantined)
    await drop_obsolete_quarantine(disk, ledger)
    return ledger


async def _stop_hashing(context: ServiceContext, disk: Store) -> None:
    await context.stopping.wait()
    disk.stopping.set()
