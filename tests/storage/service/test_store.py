"""The store on disk: its contents after each step, and what a start makes of whatever it finds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from shoal_common.errors import (
    AlreadyRunning,
    BadInput,
    BadName,
    Corrupt,
    NotFound,
    Unavailable,
    Unsupported,
)
from shoal_common.host.file_kinds import wrong_kinds_named
from shoal_common.store.store_paths import StorePaths
from shoal_storage.files.atomic_file import make_directory
from shoal_storage.files.metadata_files import MetadataFiles
from shoal_storage.store.commit import delete_blob, find_by_git_sha1
from shoal_storage.store.partials import delete_partial, has_partial
from shoal_storage.store.store import Store
from shoal_storage.store.tombstones import begin_delete, finish_delete
from shoal_storage.store.views import build_view
from tests.harness.modes import make_wrong, open_to_others, usual_umask
from tests.harness.process import source_path
from tests.storage.store_fixtures import Model, StoreFixture, files_below, files_of, put, sha256


def reopened(root: Path) -> StoreFixture:
    """The store as the next start finds it; no other one may be open."""
    return StoreFixture(root)


def test_a_model_that_came_in_is_complete_and_nothing_else_is(root: Path, apples: Model, pears: Model) -> None:
    store = StoreFixture(root)
    store.bring_in(apples)
    store.bring_in(pears)
    assert store.holds(apples) and store.holds(pears)
    assert files_below(root) == files_of(apples, pears)
    del store
    again = reopened(root)
    assert again.holds(apples) and again.holds(pears)
    assert not again.ledger.arrivals.partials and not again.ledger.incomplete
    assert files_below(root) == files_of(apples, pears)


def test_shared_blobs_come_in_once_and_stay_for_the_other_model(root: Path, apples: Model, pears: Model) -> None:
    store = StoreFixture(root)
    store.bring_in(apples)
    assert sha256(pears.bytes["other-name.bin"]) not in store.reserve(pears)
    store.bring_in(pears)
    store.delete(apples)
    assert store.holds(pears)
    assert files_below(root) == files_of(pears)
    store.delete(pears)
    assert files_below(root) == set()
    assert not any(store.layout.manifests.iterdir()) and not any(store.layout.views.iterdir())


def test_deleting_what_is_not_there_changes_nothing(root: Path, apples: Model, pears: Model) -> None:
    store = StoreFixture(root)
    store.bring_in(apples)
    for _ in range(2):
        begin_delete(store.disk, pears.manifest.model)
        finish_delete(store.disk, pears.manifest.model, ["ab" * 32])
    assert files_below(root) == files_of(apples)


def test_a_blob_is_read_only(root: Path, apples: Model) -> None:
    store = StoreFixture(root)
    store.bring_in(apples)
    assert {p.stat().st_mode & 0o777 for p in store.layout.blobs.glob("*/*")} == {0o444}


FILES = {"VERSION", "lock", "ballast"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "directory") for name in sorted(FILES)]
    + [("VERSION", "fifo"), ("VERSION", "bytes")]
    + [(name, "bytes") for name in sorted(StorePaths(Path()).top_names - FILES)]
    + [(name, "broken link") for name in ("blobs", "leases", "manifests", "partial", "views")],
)
def test_a_start_names_what_is_of_the_wrong_kind(root: Path, apples: Model, name: str, kind: str) -> None:
    StoreFixture(root).bring_in(apples)
    kept = root.parent / "kept"
    shutil.copytree(root, kept, symlinks=True)
    make_wrong(root / name, kind)
    with pytest.raises(BadInput) as refusal, wrong_kinds_named():
        store = StoreFixture(root)
        MetadataFiles(store.layout, store.ledger).read()
        make_directory(store.layout.volumes)
        make_directory(store.layout.library_blobs)
    assert f"{root / name} " in refusal.value.message and "\n" not in refusal.value.message
    shutil.rmtree(root)
    kept.rename(root)


@pytest.mark.parametrize("text", ["", "one", "\0"])
def test_a_garbled_format_is_named_with_what_to_write(root: Path, text: str) -> None:
    StoreFixture(root)
    (root / "VERSION").write_text(text)
    with pytest.raises(BadInput, match=r"VERSION holds .* instead of the store's format: write 1 into it"):
        Store(root).open()
    (root / "VERSION").write_text("1")


def test_nothing_but_blobs_has_a_mode_for_others(root: Path, apples: Model) -> None:
    with usual_umask():
        store = StoreFixture(root)
        store.bring_in(apples)
        store.reserve(apples)
    of_blobs = {str(p.relative_to(root)) for p in (*store.layout.blobs.rglob("*"), *store.layout.views.rglob("*"))}
    assert [p for p in open_to_others(root) if p.split(" ", 1)[1] not in of_blobs] == []
    del store
    # As an older version made them.
    for directory in (root, root / "partial", root / "views"):
        directory.chmod(0o755)
    (root / "VERSION").chmod(0o644)
    StoreFixture(root)
    assert not [p for p in open_to_others(root) if p.split(" ", 1)[1] in (".", "partial", "views", "VERSION")]


def test_a_file_of_a_view_is_its_blob_not_a_copy(root: Path, apples: Model) -> None:
    store = StoreFixture(root)
    store.bring_in(apples)
    for f in apples.sealed.files:
        assert store.layout.view_file(apples.sealed, f.path).samefile(store.layout.blob(f.sha256))
        assert not store.layout.view_file(apples.sealed, f.path).is_symlink()


def test_a_view_on_another_file_system_is_of_symbolic_links(root: Path, apples: Model) -> None:
    root.mkdir()
    others = [Path(d) for d in ("/dev/shm", "/run") if os.access(d, os.W_OK)]
    other = next((d for d in others if d.stat().st_dev != root.stat().st_dev), None)
    if other is None:
        pytest.skip("no second file system that can be written to on this machine: EXDEV is NOT tested here")
    with tempfile.TemporaryDirectory(dir=other) as views:
        (root / "views").symlink_to(views)
        store = StoreFixture(root)
        store.bring_in(apples)
        for f in apples.sealed.files:
            assert store.layout.view_file(apples.sealed, f.path).is_symlink()
        assert store.holds(apples)


def test_a_replaced_file_of_a_view_is_linked_to_the_blob_again(root: Path, apples: Model) -> None:
    store = StoreFixture(root)
    store.bring_in(apples)
    link = store.layout.view_file(apples.sealed, "config.json")
    link.unlink()
    link.write_text("my own words")
    assert not store.holds(apples)
    build_view(store.layout, apples.sealed)
    assert store.holds(apples)


@pytest.mark.parametrize("by_git", [(), ("weights.bin",)])
@pytest.mark.parametrize("wrong", [b"w" * 2999 + b"x", b"w" * 2999, b"w" * 3001, b"\0" * 3000, b""])
def test_I1_bytes_that_do_not_hash_to_their_name_are_no_blob(
    root: Path, by_git: tuple[str, ...], wrong: bytes
) -> None:
    model = Model("org/model", {"weights.bin": b"w" * 3000}, by_git=by_git)
    store = StoreFixture(root)
    (blob,) = store.reserve(model)
    put(store.layout, blob, wrong)
    with pytest.raises(Corrupt, match="discarded and fetched again"):
        store.commit(blob)
    assert not list(store.layout.blobs.glob("*/*"))


def test_a_small_file_named_by_git_is_found_again_by_its_bytes(root: Path, apples: Model) -> None:
    store = StoreFixture(root)
    store.bring_in(apples)
    (by_git,) = [f for f in apples.manifest.files if not f.sha256]
    found = find_by_git_sha1(store.disk, by_git.git_sha1, store.ledger.blobs)
    assert found == sha256(apples.bytes[by_git.path])
    assert find_by_git_sha1(store.disk, "0" * 40, store.ledger.blobs) is None


def test_a_held_file_keeps_its_inode_when_it_arrives_by_git_hash(root: Path) -> None:
    first = Model("org/first", {"a": b"same"})
    second = Model("org/second", {"b": b"same"}, by_git=("b",))
    store = StoreFixture(root)
    store.bring_in(first)
    store.bring_in(second)
    assert store.holds(first) and store.holds(second)
    inode = store.layout.blob(sha256(b"same")).stat()
    assert inode.st_nlink == 3, "the views of both models and the blob are one file"


def test_hashing_ends_when_the_service_stops(root: Path) -> None:
    store = StoreFixture(root)
    model = Model("org/model", {"a": b"x"})
    (blob,) = store.reserve(model)
    put(store.layout, blob, b"x")
    store.disk.stopping.set()
    with pytest.raises(Unavailable, match="stopping"):
        store.commit(blob)
    assert has_partial(store.disk, blob)


def test_a_second_process_is_refused_and_the_locks_owner_named(root: Path) -> None:
    store = StoreFixture(root)
    with pytest.raises(AlreadyRunning, match=rf"is already open, by pid {os.getpid()}; stop it first") as refused:
        Store(root).open()
    assert refused.value.exit_code == 9
    del store
    Store(root).open()


def test_a_store_of_another_format_is_refused_untouched(root: Path) -> None:
    root.mkdir()
    (root / "VERSION").write_text("3\n")
    with pytest.raises(Unsupported, match="has format 3; this version of Shoal supports 2: update Shoal"):
        Store(root).open()
    assert {p.name for p in root.iterdir()} == {"VERSION", "lock"}


def test_a_start_knows_incomplete_models_and_does_not_offer_them(root: Path, apples: Model, pears: Model) -> None:
    store = StoreFixture(root)
    store.bring_in(apples)
    store.bring_in(pears)
    lost = store.layout.blob(sha256(apples.bytes["sub/weights.bin"]))
    manifest = store.layout.manifest(apples.manifest.model)
    del store
    lost.unlink()
    store = reopened(root)
    assert set(store.ledger.manifests) == {pears.name} and set(store.ledger.incomplete) == {apples.name}
    with pytest.raises(NotFound, match=r"sub/weights.bin of org/apples@\w+ is not here"):
        store.seal(apples)
    store.bring_in(apples)
    assert store.holds(apples)
    assert manifest.exists()


def test_a_truncated_blob_is_replaced_when_its_model_comes_again(root: Path, apples: Model) -> None:
    store = StoreFixture(root)
    store.bring_in(apples)
    blob = store.layout.blob(sha256(apples.bytes["sub/weights.bin"]))
    del store
    blob.chmod(0o644)
    blob.write_bytes(b"short")
    store = reopened(root)
    assert set(store.ledger.incomplete) == {apples.name}
    store.bring_in(apples)
    assert store.holds(apples)


def test_partials_without_a_reservation_go_and_others_stay(root: Path, apples: Model) -> None:
    store = StoreFixture(root)
    blobs = store.reserve(apples)
    for blob in blobs:
        put(store.layout, blob, apples.blobs[blob][: len(apples.blobs[blob]) // 2])
    bare, halfway, garbled, read_only = blobs
    (store.layout.partial(bare) / "meta.json").unlink()
    (store.layout.partial(halfway) / "data").unlink()
    (store.layout.partial(garbled) / "meta.json").write_text("{")
    (store.layout.partial(read_only) / "data").chmod(0o444)
    del store
    store = reopened(root)
    assert set(store.ledger.arrivals.partials) == {read_only}
    assert store.ledger.arrivals.partials[read_only].models == {apples.name}
    assert store.ledger.reserved_bytes == len(apples.blobs[read_only])
    assert {p.name for p in store.layout.partials.iterdir()} == {read_only}
    assert (store.layout.partial(read_only) / "data").stat().st_mode & 0o200, "the fetcher must be able to go on"


def test_foreign_files_are_left_alone(root: Path, apples: Model) -> None:
    store = StoreFixture(root)
    store.bring_in(apples)
    paths = store.layout
    strange = [
        root / "notes.txt",
        paths.blobs / "zz" / ("ab" * 32),
        paths.blobs / "ab" / "README",
        paths.blobs / "gi" / ("git-" + "a" * 40),
        paths.partials / ".DS_Store",
        paths.partials / "README" / "data",
        paths.manifests / "org--apples" / "readme.json",
        paths.manifests / "org--pears" / f"{apples.manifest.commit}.json",
        paths.views / "mine" / "model.bin",
    ]
    for path in strange:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    copied = paths.manifest(apples.manifest.model)
    shutil.copy(copied, paths.manifests / "org--pears" / copied.name)
    (paths.blobs / "ab" / ("ab" * 32)).mkdir()
    del store
    store = reopened(root)
    assert set(store.ledger.manifests) == {apples.name}
    assert set(store.ledger.blobs) == {f.sha256 for f in apples.sealed.files}
    assert not store.ledger.arrivals.partials
    assert files_below(root) == files_of(apples) | {str(p.relative_to(root)) for p in strange}


@pytest.mark.parametrize("repo", ["..", "../..", "org--x/y"])
def test_I10_a_manifest_that_names_another_place_is_not_trusted(root: Path, apples: Model, repo: str) -> None:
    store = StoreFixture(root)
    store.bring_in(apples)
    path = store.layout.manifest(apples.manifest.model)
    path.write_text(path.read_text().replace("org/apples", repo))
    del store
    assert not reopened(root).ledger.stored_manifests


def test_I10_no_path_is_built_from_a_name_that_was_not_checked(root: Path) -> None:
    store = StoreFixture(root)
    for act in (delete_blob, delete_partial, has_partial):
        with pytest.raises(BadName):
            act(store.disk, "../../etc/passwd")


_ON_A_FULL_DISK = """
    import os, sys
    from pathlib import Path
    from tests.storage.store_fixtures import Model, StoreFixture
    root = Path(sys.argv[1]) / "store"
    model = Model("org/model", {"a": os.urandom(60000), "b": os.urandom(60000)})
    store = StoreFixture(root)
    store.bring_in(model)
    del store
    with open(Path(sys.argv[1]) / "rest", "wb", buffering=0) as rest:
        try:
            while True: rest.write(bytes(4096))
        except OSError: pass
    store = StoreFixture(root)
    assert store.holds(model) and store.disk.free_bytes() == 0, store.disk.free_bytes()
    store.delete(model)
    assert store.disk.free_bytes() >= 120000
    (Path(sys.argv[1]) / "rest").unlink()
    store.bring_in(model)
    assert store.holds(model)
    print("survived")
"""


def test_a_full_disk_opens_and_can_be_emptied(tmp_path: Path) -> None:
    mount = 'mount -t tmpfs -o size=1m,nr_inodes=64 none "$1" && exec "$2" -c "$3" "$1"'
    command = [
        "unshare",
        "-Urm",
        "sh",
        "-c",
        mount,
        "sh",
        str(tmp_path),
        sys.executable,
        textwrap.dedent(_ON_A_FULL_DISK),
    ]
    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "-Urm", "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("no mount namespaces on this machine: a full disk is NOT tested here")
    ran = subprocess.run(
        command,
        check=False,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": source_path()},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert ran.stdout == "survived\n", ran.stderr
