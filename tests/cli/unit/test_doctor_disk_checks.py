"""The doctor's checks of disks, volumes and the models on them: facts in, findings out."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from shoal_cli.doctor.checks import (
    disk,
    models,
)
from shoal_cli.doctor.checks.disk import DiskFacts, FileSystemInfo
from shoal_cli.doctor.finding import Finding
from shoal_common.messages.storage import LibraryState, StorageState, VolumeState
from shoal_common.settings.node import StorageSettings
from shoal_common.store import ballast
from tests.cli.unit.test_doctor_checks import GB, assert_finding, only

# Disk


FINE = FileSystemInfo(path="/s", kind="ext4", device=1, free_bytes=100 * GB, total_bytes=200 * GB)


def disks(**more: Any) -> list[Finding]:
    facts = {"store": FINE, "home": FINE, "store_exists": True, "storage_runs": True, "ballast_bytes": 1, **more}
    return disk.check(DiskFacts(**facts))


def changed(**more: Any) -> FileSystemInfo:
    return msgspec.structs.replace(FINE, **more)


def state(**more: Any) -> StorageState:
    return StorageState(**{"node": "a", "headroom_bytes": GB, **more})


@pytest.mark.parametrize(
    ("facts", "level", "texts"),
    [
        ({}, "ok", ("/s (ext4)", "100.0 GB free")),
        ({"store_exists": False, "storage_runs": False}, "ok", ("no store yet",)),
        ({"store_exists": False}, "problem", ("there is no store", "mounted")),
        ({"settings_errors": ["storage.path is 5"]}, "problem", ("storage.path is 5",)),
        ({"store": changed(error="Permission denied")}, "problem", ("cannot be read", "storage.path")),
        ({"state": state(store_missing=True)}, "problem", ("unmounted", "mount it again")),
        ({"store": changed(kind="nfs4")}, "problem", ("nfs4", "locks")),
        ({"store": changed(read_only=True)}, "problem", ("read-only", "dmesg")),
        ({"store": changed(inodes_total=10**6, inodes_free=500)}, "warning", ("500 inodes left",)),
        ({"store": changed(inodes_total=10**6, inodes_free=0)}, "problem", ("0 inodes left",)),
        ({"store": changed(free_bytes=GB // 2)}, "problem", ("no model fits", "shoal gc")),
        ({"store": changed(free_bytes=5 * GB), "state": state(headroom_bytes=6 * GB)}, "problem", ("6.0 GB",)),
        ({"store": changed(free_bytes=3 * GB), "state": state(headroom_bytes=2 * GB)}, "warning", ("small models",)),
        ({"state": state(quota_bytes=100, used_bytes=90, reserved_bytes=9)}, "warning", ("refused", "lru")),
        ({"state": state(quota_bytes=100, used_bytes=99, eviction_policy="lru")}, "ok", ()),
        ({"ballast_bytes": 0}, "warning", ("no ballast file",)),
        ({"ballast_bytes": 0, "settings": StorageSettings(ballast_bytes=0)}, "ok", ()),
        ({"ballast_bytes": 0, "storage_runs": False}, "ok", ()),
        ({"home": changed(path="/h", device=2, free_bytes=1)}, "problem", ("the disk of /h", "logs")),
    ],
)
def test_a_disk_finding_names_what_keeps_models_out(
    facts: dict[str, Any], level: str, texts: tuple[str, ...]
) -> None:
    assert_finding(only(disks(**facts), "disk"), level, *texts)


def test_usage_over_quota_is_reported_under_lru_too() -> None:
    found = only(disks(state=state(quota_bytes=100, used_bytes=120, eviction_policy="lru")), "disk")
    assert found.level == "warning" and "evicts others first" in found.what


def test_ballast_lost_to_a_full_disk_is_reported_with_the_disk() -> None:
    found = [f for f in disks(ballast_bytes=0, store=changed(free_bytes=GB + 1)) if f.check == "disk"]
    assert len(found) == 2 and "deleted it" in found[1].what


@pytest.mark.parametrize(
    ("facts", "level", "texts"),
    [
        ({}, "ok", ("no volumes or libraries",)),
        ({"volumes": [FINE], "libraries": [FINE]}, "ok", ("2 volumes and libraries",)),
        ({"volumes": [changed(exists=False)]}, "problem", ("not used", "--remove-volume /s")),
        (
            {"volumes": [FINE], "state": state(volumes=[VolumeState(path="/s", error="away")])},
            "problem",
            ("away",),
        ),
        ({"volumes": [changed(read_only=True)]}, "problem", ("the volume", "read-only")),
        ({"volumes": [changed(free_bytes=1)]}, "warning", ("nothing more is stored there",)),
        ({"libraries": [changed(exists=False)]}, "warning", ("cannot be read", "--remove-library /s")),
        (
            {"libraries": [FINE], "state": state(libraries=[LibraryState(path="/s", error="not UTF-8")])},
            "warning",
            ("not UTF-8",),
        ),
    ],
)
def test_a_missing_volume_is_reported(facts: dict[str, Any], level: str, texts: tuple[str, ...]) -> None:
    assert_finding(only(disks(**facts), "volumes"), level, *texts)


def test_an_incomplete_model_is_a_problem_with_its_repair() -> None:
    found = models.check("a", state(incomplete=["org/name@c"], quarantined=["ab" * 32], distrusted_sealers=["b"]))
    assert [f.level for f in found] == ["problem", "warning", "warning"]
    assert_finding(found[0], "problem", "org/name@c is incomplete", "shoal repair org/name@c --node a")
    assert_finding(found[1], "warning", "1 corrupt blob in quarantine: abababababababab…")
    assert_finding(found[2], "warning", "seals of node b do not count")
    assert_finding(only(models.check("a", state(model_count=2))), "ok", "2 models, none incomplete")
    assert_finding(only(models.check("a", None)), "skipped")


def test_the_doctors_copy_of_the_ballasts_factor_is_right() -> None:
    assert disk.BALLAST_FREE_FACTOR == ballast._MIN_FREE_MULTIPLE
