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
    Reload,
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
from shoal_common.store.disk_full import map_disk_full
from shoal_storage.context import StorageContext
from shoal_storage.eviction.disk_full import DiskFullHandler
from shoal_storage.eviction.executor import EvictionExecutor
from shoal_storage.eviction.model_deleter import ModelDeleter
from shoal_storage.handlers.configure import CONFIGURE_DEADLINE_S, ConfigureCommand
from shoal_storage.handlers.deletion import DELETE_DEADLINE_S, DeleteCommand
from shoal_storage.handlers.fetch import FetchApi
from shoal_storage.handlers.maintenance import MAINTENANCE_DEADLINE_S, MaintenanceApi
from shoal_storage.handlers.reservations import ReservationExpiry
from shoal_storage.handlers.verify import VERIFY_DEADLINE_S, Verifier
from shoal_storage.integrity.consequences import drop_obsolete_quarantine
from shoal_storage.integrity.quarantine import quarantined_blobs
from shoal_storage.integrity.repair import repairable_blobs
from shoal_storage.leases import lease_files
from shoal_storage.leases.last_use import UsageView
from shoal_storage.leases.service import LeaseService
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.libraries.scanner import reject_overlap
from shoal_storage.libraries.service import LibraryService
from shoal_storage.publisher import StatePublisher
from shoal_storage.scan.reconciler import StoreReconciler
from shoal_storage.scan.unverified import UnverifiedBlobHasher
from shoal_storage.scan.watcher import StoreWatcher
from shoal_storage.shards import ShardService
from shoal_storage.startup import recover_store
from shoal_storage.store.store import Store
from shoal_storage.volume_manager import VolumeManager, open_volumes


async def run(service: ServiceContext) -> None:
    """Run the storage service until it is told to stop."""
    settings = read_settings(StorageSettings, service.config.settings, service.environ)
    await asyncio.to_thread(reject_overlap, settings.libraries, service.config.store)
    store = Store(service.config.store, settings.ballast_bytes)
    with map_disk_full("storage tried to open its store"):
        await asyncio.to_thread(store.open)
    volume_errors = await asyncio.to_thread(open_volumes, store, settings)
    ledger = await _read_ledger(store)
    async with asyncio.TaskGroup() as tasks:
        context = StorageContext(service, store, ledger, settings, await service.mirror(tasks, "spec"))
        await asyncio.to_thread(context.metadata.read)
        async with context.section as held:
            await drop_obsolete_quarantine(held, context)

        shards = ShardService(context)
        leases = LeaseService(context, shards)
        usage = UsageView(context, leases)
        deleter = ModelDeleter(context, shards)
        evictions = EvictionExecutor(context, usage, deleter)
        fetch_api = FetchApi(context, shards, deleter, evictions)
        reconciler = StoreReconciler(context, shards)
        hasher = UnverifiedBlobHasher(context, reconciler)
        volumes = VolumeManager(context, reconciler, volume_errors)
        libraries = LibraryService(context)
        verifier = Verifier(context, hasher, libraries)
        disk_full = DiskFullHandler(context, evictions)
        maintenance = MaintenanceApi(context, evictions)
        delete_command = DeleteCommand(context, deleter, usage)
        configure_command = ConfigureCommand(context, volumes, libraries)
        reservations = ReservationExpiry(
            context,
            deleter,
            shards,
            await service.mirror(tasks, "state", f"download.{service.node}.>"),
            await service.mirror(tasks, "live", f"{service.node}.>"),
        )
        publisher = StatePublisher(
            context,
            await service.mirror(tasks, "state", f"*.{service.node}.>"),
            await service.mirror(tasks, "state", storage_key(service.node)),
            libraries.states,
            volumes.states,
        )

        first_scan = await libraries.start()
        publishing = tasks.create_task(publisher.publish_forever())
        await context.publishing.publish_all()
        for background in (
            first_scan,
            libraries.scan_forever(),
            libraries.hash_forever(),
            publisher.republish_after_reconnects(),
            publisher.republish_removed_keys(),
            leases.expire_forever(),
            disk_full.check_forever(),
            reservations.check_forever(),
            maintenance.write_uses_forever(),
            hasher.hash_forever(),
            StoreWatcher(store.layout, reconciler).watch_forever(),
            volumes.watch_forever(),
            verifier.scrub_forever(),
            verifier.check_seals_forever(),
        ):
            service.run_in_background(tasks, background)
        tasks.create_task(_stop_hashing(service, store))
        async with asyncio.TaskGroup() as answering:
            answering.create_task(
                service.serve(
                    {
                        "reserve": RpcEndpoint(Reserve, disk_full.with_disk_full_retry("reserve", fetch_api.reserve)),
                        "release": RpcEndpoint(Release, fetch_api.release),
                        "commit": RpcEndpoint(
                            CommitBlob, disk_full.with_disk_full_retry("commit a blob", fetch_api.commit)
                        ),
                        "seal": RpcEndpoint(
                            SealModel, disk_full.with_disk_full_retry("seal a model", fetch_api.seal)
                        ),
                        "seal_shard": RpcEndpoint(
                            SealShard, disk_full.with_disk_full_retry("record a shard", shards.seal)
                        ),
                        "manifest": RpcEndpoint(GetManifest, fetch_api.manifest),
                        "lease": RpcEndpoint(
                            AcquireLease, disk_full.with_disk_full_retry("make a view for a lease", leases.lease)
                        ),
                        "release_lease": RpcEndpoint(ReleaseLease, leases.release),
                        "plan": RpcEndpoint(PlanEviction, maintenance.plan),
                        "check_space": RpcEndpoint(CheckSpace, disk_full.check_space),
                        "record_use": RpcEndpoint(RecordUse, maintenance.record_use),
                    }
                )
            )
            answering.create_task(
                service.run_commands(
                    {
                        "delete": CommandHandler(Delete, delete_command.delete, DELETE_DEADLINE_S),
                        "pin": CommandHandler(Pin, maintenance.pin, MAINTENANCE_DEADLINE_S),
                        "gc": CommandHandler(CollectGarbage, maintenance.collect_garbage, MAINTENANCE_DEADLINE_S),
                        "configure": CommandHandler(Configure, configure_command.configure, CONFIGURE_DEADLINE_S),
                        "reload": CommandHandler(Reload, configure_command.reload, CONFIGURE_DEADLINE_S),
                        "verify": CommandHandler(Verify, verifier.verify, VERIFY_DEADLINE_S),
                    }
                )
            )
            service.ready(NodeFacts(disk_free_bytes=await asyncio.to_thread(store.free_bytes)))
        publishing.cancel()  # not before: what is still answered may wait for it
    await maintenance.write_uses()
    await libraries.save_hashes()


async def _read_ledger(store: Store) -> Ledger:
    """Read what the disk holds, after finishing what a crash interrupted."""
    leases = await asyncio.to_thread(lease_files.read_leases, store, time.monotonic(), time.time())
    ledger = await asyncio.to_thread(recover_store, store, leases)
    ledger.add_quarantined(await asyncio.to_thread(quarantined_blobs, store))
    ledger.set_repairable(await asyncio.to_thread(repairable_blobs, store, ledger.quarantined))
    return ledger


async def _stop_hashing(service: ServiceContext, store: Store) -> None:
    await service.stopping.wait()
    store.stopping.set()
