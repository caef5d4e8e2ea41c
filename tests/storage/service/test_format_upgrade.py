"""A store of format 1, whose names have capitals, becomes one of format 2, whatever interrupts it."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal_common.names import commit_of, repo_of
from shoal_common.store.store_paths import old_manifest_path
from shoal_storage.files import atomic_file
from shoal_storage.files.metadata_files import MetadataFiles
from shoal_storage.store import format_upgrade
from tests.storage.store_fixtures import Model, StoreFixture, check_invariants, files_below

CAPITALS = Model("Shoal/Tiny-Fish", {"config.json": b"{}", "a/model.safetensors": b"capitals"})
OTHER_COMMIT = Model("Shoal/Tiny-Fish", {"config.json": b"{}", "model.safetensors": b"newer"}, commit="d" * 40)
SMALL = Model("shoal/tiny-fish", {"config.json": b"{}", "model.safetensors": b"small"}, commit="e" * 40)
MODELS = (CAPITALS, OTHER_COMMIT, SMALL)


def fill(root: Path) -> set[str]:
    """Fill a store with the models, the first of them pinned. Returns its files."""
    store = StoreFixture(root)
    for model in MODELS:
        store.bring_in(model)
    MetadataFiles(store.layout, store.ledger).pin(CAPITALS.name)
    store.disk.close()
    return files_below(root)


def make_old(root: Path) -> None:
    """Give a store the names of format 1, as a file system that ignores case keeps them."""
    layout = StoreFixture(root).layout
    for model in MODELS:
        manifest, view = layout.manifest(model.name), layout.view(model.name)
        # One directory for both repositories: the first that came named it.
        place = root / old_manifest_path(CAPITALS.name).replace(commit_of(CAPITALS.name), commit_of(model.name))
        place.parent.mkdir(exist_ok=True)
        manifest.rename(place)
        old_view = root / "views" / place.parent.name / view.name
        old_view.parent.mkdir(exist_ok=True)
        view.rename(old_view)
        for emptied in (manifest.parent, view.parent):
            if not any(emptied.iterdir()):
                emptied.rmdir()
    pin = layout.pin(CAPITALS.name)
    pin.rename(pin.with_name(f"{repo_of(CAPITALS.name).replace('/', '--')}@{commit_of(CAPITALS.name)}"))
    layout.version.write_text("1")


def check_upgraded(root: Path) -> None:
    """Check that all models are there, the pin, and no old name."""
    store = StoreFixture(root)
    check_invariants(root)
    assert store.layout.version.read_text() == "2"
    assert store.holds(CAPITALS) and store.holds(OTHER_COMMIT)
    assert SMALL.name in store.ledger.manifests and not store.ledger.foreign.count
    assert store.layout.pin(CAPITALS.name).exists()
    assert not [path for path in files_below(root) if path.startswith(("manifests/S", "views/S", "pins/S"))]
    store.delete(CAPITALS)
    store.disk.close()
    again = StoreFixture(root)
    assert again.holds(OTHER_COMMIT) and SMALL.name in again.ledger.manifests


def test_an_old_store_keeps_every_model_and_pin(root: Path) -> None:
    fill(root)
    make_old(root)
    check_upgraded(root)


def test_I6_an_upgrade_that_is_killed_goes_on_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, killed_at = Path.rename, 0

    class Killed(BaseException):
        pass

    while True:
        root, left = tmp_path / f"killed-{killed_at}", killed_at
        fill(root)
        make_old(root)

        def rename(path: Path, target: Path) -> Path:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return real(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", rename)
            try:
                StoreFixture(root).disk.close()
            except Killed:
                killed_at += 1
            else:
                break
        assert (root / "VERSION").read_text() == "1"
        check_upgraded(root)
    assert killed_at >= 4
    check_upgraded(root)


def test_I6_the_version_is_written_when_all_renames_are_durable(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(root)
    make_old(root)
    events: list[str] = []
    real_rename, real_fsync = Path.rename, atomic_file.fsync_path

    def rename(path: Path, target: Path) -> Path:
        events.extend(f"renamed in {parent.relative_to(root)}" for parent in (path.parent, Path(target).parent))
        return real_rename(path, target)

    def fsync(path: Path) -> None:
        events.append(f"synced {path.relative_to(root)}")
        real_fsync(path)

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(format_upgrade, "fsync_path", fsync)
    monkeypatch.setattr(format_upgrade, "replace_file", lambda *_: events.append("version"))
    StoreFixture(root).disk.close()
    before = events[: events.index("version")]
    changed = {event.removeprefix("renamed in ") for event in before if event.startswith("renamed in ")}
    assert {"manifests", "views", "pins"} < changed
    for directory in changed:
        last_change = max(at for at, event in enumerate(before) if event == f"renamed in {directory}")
        assert f"synced {directory}" in before[last_change:], directory


def test_a_store_without_capitals_only_gets_the_version(root: Path, apples: Model) -> None:
    store = StoreFixture(root)
    store.bring_in(apples)
    store.disk.close()
    before = files_below(root)
    store.layout.version.write_text("1")
    again = StoreFixture(root)
    assert again.holds(apples) and files_below(root) == before
    assert again.layout.version.read_text() == "2"
