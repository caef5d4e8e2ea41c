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
from shoal_common.settings.node import StorageSettings
from shoal_common.settings.values import read_settings
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
from shoal_storage.startup import recover_store
from shoal_storage.store.store import Store
from shoal_storage.volume_manager import VolumeManager, open_volumes


async def _start_publisher(
    context: ServiceContext, tasks: asyncio.TaskGroup, store: Store, ledger: Ledger, settings: StorageSettings
) -> StatePublisher:
    model_mirror = await context.mirror(tasks, "state", f"*.{context.node}.>")
    storage_mirror = await context.mirror(tasks, "state", storage_key(context.node))
    return StatePublisher(context, store, ledger, settings, model_mirror, storage_mirror)


async def run(context: ServiceContext) -> None:
    """Run the storage service until it is told to stop."""
    settings = read_settings(StorageSettings, context.config.settings, context.environ)
    await asyncio.to_thread(reject_overlap, settings.libraries, context.config.store)
    store = Store(context.config.store, settings.ballast_bytes)
    with map_disk_full("open its store"):
        await asyncio.to_thread(store.open)
    volume_errors = await asyncio.to_thread(open_volumes, store, settings)
    ledger = await _read_ledger(store)
    async with asyncio.TaskGroup() as tasks:
        specs = await context.mirror(tasks, "spec")
        downloads = await context.mirror(tasks, "state", f"download.{context.node}.>")
        live = await context.mirror(tasks, "live", f"{context.node}.>")
        publisher = await _start_publisher(context, tasks, store, ledger, settings)
        fetch_api = FetchApi(context, store, ledger, settings, specs, publisher)
        await asyncio.to_thread(fetch_api.metadata.read)
        integrity = IntegrityPublisher(context, store, ledger, specs, publisher)
        reconciler = StoreReconciler(
            context, store, ledger, fetch_api.section, fetch_api.metadata, publisher, integrity, fetch_api.shards
        )
        volumes = VolumeManager(store, ledger, fetch_api.section, publisher, reconciler, settings, volume_errors)
        libraries = LibraryService(context, store, ledger, fetch_api.section, publisher, settings.libraries)
        first_scan = await libraries.start()
        await publisher.publish_all()

        async def apply_settings(new_settings: StorageSettings) -> None:
            fetch_api.apply_settings(new_settings)
            await volumes.use_settings(new_settings)
            await libraries.use_libraries(new_settings.libraries)

        configure_command = ConfigureCommand(
            context, store, ledger, settings, apply_settings, publisher.publish_storage, volumes.reject_unusable
        )
        context.run_in_background(tasks, first_scan)
        context.run_in_background(tasks, libraries.scan_forever())
        context.run_in_background(tasks, libraries.hash_forever())
        context.run_in_background(tasks, fetch_api.republish_after_reconnects())
        context.run_in_background(tasks, fetch_api.republish_removed_keys())
        context.run_in_background(tasks, fetch_api.leases.expire_forever())
        disk_full = DiskFullHandler(context, store, ledger, fetch_api.section, fetch_api.evictions, publisher)
        context.run_in_background(tasks, disk_full.check_forever())
        reservations = ReservationExpiry(
            context,
            ledger,
            fetch_api.section,
            fetch_api.metadata,
            fetch_api.deletions,
            fetch_api.shards,
            publisher,
            lambda: fetch_api.evictions.settings,
            specs,
            downloads,
            live,
        )
        context.run_in_background(tasks, reservations.check_forever())
        maintenance = MaintenanceApi(
            context, ledger, fetch_api.section, fetch_api.evictions, fetch_api.metadata, publisher
        )
        context.run_in_background(tasks, maintenance.write_uses_forever())
        hasher = UnverifiedBlobHasher(store, ledger, fetch_api.section, reconciler)
        context.run_in_background(tasks, hasher.hash_forever())
        context.run_in_background(tasks, StoreWatcher(store.layout, reconciler).watch_forever())
        context.run_in_background(tasks, volumes.watch_forever())
        verifier = Verifier(
            context, store, ledger, fetch_api.section, integrity, hasher, publisher, libraries.handle_bad_blob
        )
        context.run_in_background(tasks, verifier.scrub_forever())
        tasks.create_task(_stop_hashing(context, store))
        tasks.create_task(
            context.serve(
                {
                    "reserve": RpcEndpoint(Reserve, disk_full.with_disk_full_retry("reserve", fetch_api.reserve)),
                    "release": RpcEndpoint(Release, fetch_api.release),
                    "commit": RpcEndpoint(
                        CommitBlob, disk_full.with_disk_full_retry("commit a blob", fetch_api.commit)
                    ),
                    "seal": RpcEndpoint(SealModel, disk_full.with_disk_full_retry("seal a model", fetch_api.seal)),
                    "seal_shard": RpcEndpoint(
                        SealShard, disk_full.with_disk_full_retry("record a shard", fetch_api.shards.seal)
                    ),
                    "manifest": RpcEndpoint(GetManifest, fetch_api.manifest),
                    "lease": RpcEndpoint(
                        AcquireLease,
                        disk_full.with_disk_full_retry("make a view for a lease", fetch_api.leases.lease),
                    ),
                    "release_lease": RpcEndpoint(ReleaseLease, fetch_api.leases.release),
                    "plan": RpcEndpoint(PlanEviction, maintenance.plan),
                    "check_space": RpcEndpoint(CheckSpace, disk_full.check_space),
                    "record_use": RpcEndpoint(RecordUse, maintenance.record_use),
                }
            )
        )
        tasks.create_task(
            context.run_commands(
                {
                    "delete": CommandHandler(Delete, fetch_api.deletions.delete, DELETE_DEADLINE_S),
                    "pin": CommandHandler(Pin, maintenance.pin, MAINTENANCE_DEADLINE_S),
                    "gc": CommandHandler(CollectGarbage, maintenance.collect_garbage, MAINTENANCE_DEADLINE_S),
                    "configure": CommandHandler(Configure, configure_command.configure, CONFIGURE_DEADLINE_S),
                    "verify": CommandHandler(Verify, verifier.verify, VERIFY_DEADLINE_S),
                }
            )
        )
        context.ready(NodeFacts(disk_free_bytes=await asyncio.to_thread(store.free_bytes)))
    await maintenance.write_uses()
    await libraries.save_hashes()


async def _read_ledger(store: Store) -> Ledger:
    """Read what the disk holds, after finishing what a crash interrupted."""
    leases = await asyncio.to_thread(lease_files.read_leases, store, time.monotonic(), time.time())
    ledger = await asyncio.to_thread(recover_store, store, leases)
    ledger.add_quarantined(await asyncio.to_thread(quarantined_blobs, store))
    ledger.set_repairable(await asyncio.to_thread(repairable_blobs, store, ledger.quarantined))
    await drop_obsolete_quarantine(store, ledger)
    return ledger


async def _stop_hashing(context: ServiceContext, store: Store) -> None:
    await context.stopping.wait()
    store.stopping.set()
