"""Views are links, never copies: reflinks if the file system has them, else hard links, else symbolic ones."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shoal_storage.integrity import blob_check, quarantine
from shoal_storage.ledger.references import manifests_with_blob
from shoal_storage.store import views
from tests.harness.tiny_filesystem import small_disk
from tests.storage.service.test_power_cuts import _can_mount, make_image, mounted
from tests.storage.store_fixtures import Model, StoreFixture, files_below

WEIGHTS = b"w" * 300_000
TINY_BYTES = 8 << 20
MODEL = Model("org/model", {"weights.bin": WEIGHTS, "sub/config.json": b"{}", "empty": b""})


@contextmanager
def disk_of(kind: str, directory: Path) -> Iterator[Path]:
    """An empty file system of a kind, while the body runs."""
    if reason := _can_mount(kind):
        pytest.skip(f"views on {kind} are NOT tested here: {reason}")
    make_image(kind, directory / "image")
    with mounted(kind, directory / "image", directory / kind) as at:
        yield at


@contextmanager
def store_on(at: Path) -> Iterator[StoreFixture]:
    """A store that is closed before its file system is unmounted."""
    store = StoreFixture(at)
    try:
        yield store
    finally:
        store.disk.close()


def same_file(one: Path, other: Path) -> bool:
    return one.lstat().st_ino == other.lstat().st_ino


def test_on_xfs_views_are_reflinks_that_survive_their_blob(tmp_path: Path) -> None:
    with disk_of("xfs", tmp_path) as at, store_on(at / "store") as store:
        before = os.umask(0o077)
        try:
            store.bring_in(MODEL)
            used = os.statvfs(at)
            leases = [store.lease(MODEL, f"lease-{n}") for n in range(32)]
        finally:
            os.umask(before)
        taken = (used.f_bfree - os.statvfs(at).f_bfree) * used.f_frsize
        assert taken < 32 * len(WEIGHTS) / 2, "32 views are no 32 copies"
        for f in MODEL.sealed.files:
            blob = store.layout.blob(f.sha256)
            for target in (
                store.layout.view_file(MODEL.sealed, f.path),
                store.layout.lease_view(leases[0].id) / f.path,
            ):
                assert not target.is_symlink() and not same_file(target, blob)
                assert target.stat().st_nlink == blob.stat().st_nlink == 1
                assert target.stat().st_mode & 0o7777 == 0o444
                assert views.links_to_blob(target, blob)
        # Rebuilding changes nothing; a file that somebody wrote to is replaced, and the blob is unaffected.
        view_file = store.layout.view_file(MODEL.sealed, "weights.bin")
        inode = view_file.stat().st_ino
        views.build_view(store.layout, MODEL.sealed)
        assert view_file.stat().st_ino == inode
        view_file.chmod(0o644)
        with view_file.open("r+b") as opened:
            opened.write(b"mine")
        assert store.leased_view_is_complete(leases[0], MODEL)
        views.build_view(store.layout, MODEL.sealed)
        assert store.holds(MODEL)


def test_I1_a_reflinked_view_of_a_corrupt_blob_is_removed(
    tmp_path: Path,
) -> None:
    with disk_of("xfs", tmp_path) as at, store_on(at / "store") as store:
        store.bring_in(MODEL)
        lease = store.lease(MODEL, "one")
        weights = next(f for f in MODEL.sealed.files if f.path == "weights.bin")
        blob = store.layout.blob(weights.sha256)
        view, leased = store.layout.view_file(MODEL.sealed, weights.path), store.layout.lease_view("one")
        assert not same_file(view, blob)
        blob.chmod(0o644)
        with blob.open("r+b") as f:
            f.write(b"?")
        checked = blob_check.hash_blob(store.disk, weights.sha256, lambda _: None)
        assert checked is not None and not checked.intact
        manifests = manifests_with_blob(weights.sha256, store.ledger)
        assert quarantine.quarantine_blob(store.disk, checked, manifests, [lease])
        assert not view.exists() and not (leased / weights.path).exists() and not blob.exists()
        assert (leased / "sub/config.json").read_bytes() == b"{}", "what is sound stays"
        # A model whose manifest was removed by hand is still in the lease's own list.
        shutil.copytree(leased, at / "copy")
        (leased / weights.path).write_bytes(b"?" + WEIGHTS[1:])
        (store.layout.quarantine / weights.sha256).replace(blob)
        checked = blob_check.hash_blob(store.disk, weights.sha256, lambda _: None)
        assert checked is not None and quarantine.quarantine_blob(store.disk, checked, [], [lease])
        assert not (leased / weights.path).exists()


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
def test_without_reflinks_a_views_files_are_hard_links(tmp_path: Path, kind: str) -> None:
    with (
        small_disk(tmp_path / "tiny", TINY_BYTES) if kind == "tmpfs" else disk_of("ext4", tmp_path) as at,
        store_on(at / "store") as store,
    ):
        store.bring_in(MODEL)
        leases = [store.lease(MODEL, f"lease-{n}") for n in range(3)]
        for f in MODEL.sealed.files:
            blob = store.layout.blob(f.sha256)
            assert blob.stat().st_nlink == 2 + len(leases)
            assert all((store.layout.lease_view(x.id) / f.path).samefile(blob) for x in leases)
        shutil.rmtree(store.layout.lease(leases[0].id))
        assert store.holds(MODEL) and store.leased_view_is_complete(leases[1], MODEL)


def test_across_file_systems_a_views_files_are_symbolic_links(tmp_path: Path) -> None:
    store = StoreFixture(tmp_path / "store")
    store.bring_in(MODEL)
    with small_disk(store.layout.leases, TINY_BYTES), small_disk(tmp_path / "elsewhere", TINY_BYTES):
        lease = store.lease(MODEL, "far")
        for f in MODEL.sealed.files:
            target = store.layout.lease_view(lease.id) / f.path
            assert target.is_symlink() and target.samefile(store.layout.blob(f.sha256))
            assert views.links_to_blob(target, store.layout.blob(f.sha256))
        assert store.leased_view_is_complete(lease, MODEL)


@pytest.mark.skipif(sys.platform != "linux", reason="reflinks by ioctl are Linux's: their refusals are NOT tested")
@pytest.mark.parametrize(
    ("refusal", "falls_through"),
    [
        *((n, True) for n in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY)),
        *((n, False) for n in (errno.ENOSPC, errno.EDQUOT, errno.EIO)),
    ],
)
def test_an_unsupported_reflink_falls_back_but_a_full_disk_fails(
    root: Path, monkeypatch: pytest.MonkeyPatch, refusal: int, falls_through: bool
) -> None:
    store = StoreFixture(root)
    store.bring_in(MODEL)
    asked = 0

    def refuse(*_: object) -> int:
        nonlocal asked
        asked += 1
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr("fcntl.ioctl", refuse)
    if falls_through:
        assert store.leased_view_is_complete(store.lease(MODEL, "one"), MODEL)
    else:
        with pytest.raises(OSError, match=os.strerror(refusal)):
            store.lease(MODEL, "one")
        assert not any(p.startswith("leases/") for p in files_below(root)) and not any(
            store.layout.tombstones.iterdir()
        )
    assert asked == 1, "a view asks the file system once"


def test_a_directory_in_a_views_place_is_not_taken_for_a_blob(root: Path) -> None:
    store = StoreFixture(root)
    store.bring_in(MODEL)
    blob = store.layout.blob(MODEL.sealed.files[0].sha256)
    assert not views.links_to_blob(store.layout.views, blob)
    assert not views.links_to_blob(root / "absent", blob)
    (root / "dangling").symlink_to(root / "absent")
    assert not views.links_to_blob(root / "dangling", blob)
