"""When a notification leads to a scan: never for storage's own writes, always for those of others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from shoal_common.names import model_id
from shoal_storage.scan.change_filter import has_visible_change
from shoal_storage.scan.diff import apply_diff, diff_store
from shoal_storage.scan.scanner import scan_store
from shoal_storage.store.commit import link_view
from tests.storage.store_fixtures import Model, StoreFixture, sha256
from tests.storage.syscall_tracer import seen


def differs(store: StoreFixture, *paths: Path) -> bool:
    """Whether these paths are worth a scan."""
    return has_visible_change(store.layout, store.ledger, paths)


def watched(root: Path) -> list[Path]:
    """All paths that a notification may name."""
    return [p for top in ("blobs", "manifests", "views") for p in (root / top).rglob("*")]


def test_storages_own_changes_cause_no_scan(root: Path, apples: Model, pears: Model) -> None:
    store = StoreFixture(root)
    with seen(root) as seam:
        store.bring_in(apples)
        assert not [p for p in watched(root) if differs(store, p)]
        store.bring_in(pears)
        store.delete(apples)
        store.bring_in(apples)
        store.reserve(Model("org/coming", {"a": b"later"}))
    assert not [p for p in watched(root) if differs(store, p)]
    # Also what existed for a while: temporary files, directories, what was moved to tombs.
    touched = {Path(p) for call in seam.calls for p in call.paths}
    named = {p for p in touched if any(p.is_relative_to(root / top) for top in ("blobs", "manifests", "views"))}
    assert len(named) > 20 and not [p for p in named if differs(store, p)]
    store.delete(apples)
    store.delete(pears)
    assert not [p for p in named if differs(store, p)]


WEIGHTS = sha256(b"w" * 3000)


def _blob(store: StoreFixture) -> Path:
    return store.layout.blob(WEIGHTS)


def _manifest(store: StoreFixture, model: Model) -> Path:
    return store.layout.manifest(model.sealed.model)


def _view(store: StoreFixture, model: Model, path: str) -> Path:
    return store.layout.view_file(model.sealed, path)


def _written(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


def _removed(path: Path) -> Path:
    path.unlink()
    return path


def _moved(store: StoreFixture, path: Path) -> Path:
    path.rename(store.root.with_name("aside"))
    return path


CHANGES: dict[str, Callable[[StoreFixture, Model], Path]] = {
    "a blob removed": lambda s, _: _removed(_blob(s)),
    "a blob replaced by as many bytes": lambda s, _: _written(_blob(s), b"x" * 3000),
    "a blob's directory moved away": lambda s, _: _moved(s, _blob(s).parent),
    "a blob copied in": lambda s, _: _written(s.layout.blob("ab" * 32), b"x"),
    "a directory of blobs copied in": lambda s, _: _written(s.layout.blob("ab" * 32), b"x").parent,
    "a strange file among the blobs": lambda s, _: _written(s.layout.blobs / "notes.txt", b"x"),
    "a manifest removed": lambda s, m: _removed(_manifest(s, m)),
    "a manifest's directory moved away": lambda s, m: _moved(s, _manifest(s, m).parent),
    "a manifest garbled": lambda s, m: _written(_manifest(s, m), b"{"),
    "a manifest copied in": lambda s, _: _written(s.layout.manifest(model_id("org/new", "c" * 40)), b"{}"),
    "a view's file removed": lambda s, m: _removed(_view(s, m, "sub/weights.bin")),
    "a view's file replaced": lambda s, m: _written(_view(s, m, "sub/weights.bin"), b"w" * 3000),
    "a view moved away": lambda s, m: _moved(s, _view(s, m, "shared.bin").parent),
    "a strange file in a view": lambda s, m: _written(_view(s, m, "sub/mine.txt"), b"x"),
    "a strange file beside the views": lambda s, _: _written(s.layout.views / "mine.txt", b"x"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_foreign_changes_cause_one_scan(tmp_path: Path, apples: Model, what: str) -> None:
    store = StoreFixture(tmp_path / "store")
    store.bring_in(apples)
    path = CHANGES[what](store, apples)
    assert differs(store, path)
    found = diff_store(store.ledger, scan_store(store.layout))
    assert found.changes_ledger(store.ledger), "a scan sees it too"
    apply_diff(found, store.ledger)
    for model in found.unlinked_models & store.ledger.manifests.keys():
        link_view(store.disk, store.ledger.manifests[model])
    assert not diff_store(store.ledger, scan_store(store.layout)).changes_ledger(store.ledger), "and then it is known"
