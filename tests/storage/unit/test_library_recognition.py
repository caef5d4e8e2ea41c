"""What in a library is recognized as a model, and what never is (I10)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal_common.errors import BadInput
from shoal_common.names import model_id
from shoal_common.store.store_paths import StorePaths
from shoal_storage.admission.manifest_check import check_manifest
from shoal_storage.ledger.library_model import FileStat, VerifiedFile
from shoal_storage.libraries.recognize import (
    DirEntry,
    LibraryListing,
    ModelCandidate,
    RecognizedModels,
    accept_models,
    is_corrupt,
    recognize,
    resolve_cache_link,
)
from shoal_storage.libraries.scanner import LibraryUnreadable, hash_file, list_library, reject_overlap
from tests.storage.library_fixtures import cached, config, plain, safetensors
from tests.storage.store_fixtures import Model, StoreFixture, git_sha1, sha256

COMMIT = "a" * 40
FILES = {
    "config.json": config(),
    "model.safetensors": safetensors(b"w" * 900),
    "sub/more.safetensors": safetensors(b"m" * 50),
}


def scan_library(root: Path) -> RecognizedModels:
    return recognize(list_library(str(root), lambda: None))


def hashed(found: RecognizedModels) -> dict[str, VerifiedFile]:
    """What the service knows once it has hashed everything."""
    verified = {}
    for file in (f for c in found.candidates for f in c.files):
        digests = hash_file(file, lambda: None)
        assert digests is not None
        verified[file.absolute_path] = VerifiedFile(stat=file.stat, sha256=digests.sha256, git_sha1=digests.git_sha1)
    return verified


def only(found: RecognizedModels) -> ModelCandidate:
    assert found.refused == {}
    (candidate,) = found.candidates
    return candidate


def refusal(found: RecognizedModels) -> str:
    assert found.candidates == []
    (reason,) = found.refused.values()
    return reason


def test_a_cache_yields_its_snapshots_with_names_of_their_refs(tmp_path: Path) -> None:
    cached(tmp_path, "org/name", COMMIT, FILES, ("main", "refs/pr/1"))
    cached(tmp_path, "org/name", "b" * 40, {**FILES, "model.safetensors": safetensors(b"older")}, ("v1.0",))
    (tmp_path / ".locks" / "models--org--name").mkdir(parents=True)
    (tmp_path / "version.txt").write_text("1")
    (tmp_path / "datasets--org--name" / "snapshots" / COMMIT).mkdir(parents=True)
    found = scan_library(tmp_path)
    assert found.refused == {}
    assert [(c.repo, c.commit, c.revisions) for c in found.candidates] == [
        ("org/name", COMMIT, ("main", "refs/pr/1")),
        ("org/name", "b" * 40, ("v1.0",)),
    ]
    assert {f.path: f.expected_hash for f in found.candidates[0].files} == {
        "config.json": f"git-{git_sha1(FILES['config.json'])}",
        "model.safetensors": sha256(FILES["model.safetensors"]),
        "sub/more.safetensors": sha256(FILES["sub/more.safetensors"]),
    }
    waiting = accept_models(found.candidates, {})
    assert waiting.accepted == {} and len(waiting.waiting) == 2
    verdict = accept_models(found.candidates, hashed(found))
    assert verdict.waiting == [] and sorted(verdict.accepted) == [f"org/name@{COMMIT}", f"org/name@{'b' * 40}"]
    manifest = verdict.accepted[model_id("org/name", COMMIT)].manifest
    check_manifest(manifest)
    assert {f.path: f.sha256 for f in manifest.files} == {p: sha256(d) for p, d in FILES.items()}


def test_a_plain_directory_is_local_and_named_by_its_content(tmp_path: Path) -> None:
    plain(tmp_path / "one", "me/tuned", {**FILES, ".cache/huggingface/x.metadata": b"1", ".gitignore": b"*"})
    plain(tmp_path / "two", "me/tuned", FILES)
    plain(tmp_path / "two", "me/notes", {"readme.md": b"no model"})
    plain(tmp_path / "three", "me/tuned", {**FILES, "model.safetensors": safetensors(b"other")})
    verdicts = []
    for name in ("one", "two", "three"):
        found = scan_library(tmp_path / name)
        assert only(found).revisions == ("local",) and only(found).commit == ""
        verdicts.append(accept_models(found.candidates, hashed(found)))
    one, two, three = (next(iter(v.accepted)) for v in verdicts)
    assert one == two != three
    both = [*scan_library(tmp_path / "one").candidates, *scan_library(tmp_path / "three").candidates]
    verdict = accept_models(
        both, {**hashed(scan_library(tmp_path / "one")), **hashed(scan_library(tmp_path / "three"))}
    )
    assert list(verdict.accepted) == [one], "me/tuned@local means one thing"
    assert "is " in verdict.refused[str(tmp_path / "three" / "me" / "tuned")]


def test_another_store_yields_its_complete_models(tmp_path: Path, apples: Model, pears: Model) -> None:
    store = StoreFixture(tmp_path / "theirs")
    store.bring_in(apples)
    store.bring_in(pears)
    found = scan_library(tmp_path / "theirs")
    assert [(c.repo, c.commit, c.revisions) for c in found.candidates] == [
        (m.manifest.repo, m.manifest.commit, ("main",)) for m in (apples, pears)
    ]
    verdict = accept_models(found.candidates, hashed(found))
    assert {m: a.manifest.files for m, a in verdict.accepted.items()} == {
        m.name: sorted(m.sealed.files, key=lambda f: f.path) for m in (apples, pears)
    }
    store.layout.blob(sha256(pears.bytes["pears.bin"])).unlink()
    found = scan_library(tmp_path / "theirs")
    assert [c.repo for c in found.candidates] == ["org/apples"]
    assert "pears.bin is missing" in next(iter(found.refused.values()))
    (tmp_path / "theirs" / "VERSION").write_text("99")
    assert "format '99'" in refusal(scan_library(tmp_path / "theirs"))


def test_a_model_with_missing_files_is_not_recognized(tmp_path: Path) -> None:
    index = b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    part = {"config.json": config(), "model.safetensors.index.json": index, "model-1.safetensors": safetensors(b"1")}
    cached(tmp_path / "cache", "org/name", COMMIT, part)
    assert "model-2.safetensors" in refusal(scan_library(tmp_path / "cache"))
    plain(tmp_path / "plain", "org/name", part)
    assert "model-2.safetensors" in refusal(scan_library(tmp_path / "plain"))
    cached(tmp_path / "tokenizer", "org/name", COMMIT, {"config.json": config()})
    assert "no weights" in refusal(scan_library(tmp_path / "tokenizer"))
    snapshot = cached(tmp_path / "broken", "org/name", COMMIT, FILES)
    blob = (snapshot / "model.safetensors").resolve()
    blob.rename(blob.with_name(f"{blob.name}.incomplete"))
    assert "model.safetensors is missing: its download is incomplete" in refusal(scan_library(tmp_path / "broken"))
    whole = {**part, "model-2.safetensors": safetensors(b"2")}
    cached(tmp_path / "whole", "org/name", COMMIT, whole)
    assert {f.path for f in only(scan_library(tmp_path / "whole")).files} == set(whole)


@pytest.mark.parametrize(
    "name",
    ["models--gpt2", "models--a--b--c", "models--..--x", "models--org--na me", "models--org--x@main", "models----x"],
)
def test_I10_bad_model_names_are_reported_and_not_accepted(tmp_path: Path, name: str) -> None:
    cached(tmp_path, "org/name", COMMIT, FILES)
    (tmp_path / "models--org--name").rename(tmp_path / name)
    assert "org/name" in refusal(scan_library(tmp_path))


def test_I10_hostile_refs_commits_and_paths_are_not_accepted(tmp_path: Path) -> None:
    cached(tmp_path, "org/name", COMMIT, FILES, ("main", "..x", "local"))
    (tmp_path / "models--org--name" / "refs" / "odd").write_text("../../etc")
    cached(tmp_path, "org/other", "not-a-commit", FILES, ())
    cached(tmp_path, "org/third", COMMIT, {**FILES, "a:b.bin": b"x"}, ())
    plain(tmp_path, "org--x/name", FILES)
    found = scan_library(tmp_path)
    assert [(c.repo, c.revisions) for c in found.candidates] == [("org/name", ("main",))]
    assert {Path(d).relative_to(tmp_path).as_posix() for d in found.refused} == {
        "models--org--name/refs/..x",
        "models--org--name/refs/odd",
        "models--org--other/snapshots/not-a-commit",
        f"models--org--third/snapshots/{COMMIT}",
        "org--x/name",
    }
    bad = os.fsencode(tmp_path) + b"/models--org--name/snapshots/" + COMMIT.encode() + b"/\xff.bin"
    Path(os.fsdecode(bad)).write_bytes(b"x")
    assert [c.repo for c in scan_library(tmp_path).candidates] == []


def test_I10_links_are_followed_only_into_the_models_own_blobs(tmp_path: Path) -> None:
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(b"s" * 10)
    root = tmp_path / "root"
    targets = {
        "out": str(secret),
        "up": "../../../../secret.safetensors",
        "twin": f"../../../models--org--good/blobs/{sha256(FILES['model.safetensors'])}",
        "self": "../../refs/main",
        "deep": "../../blobs/x/y",
        "loop": "model.safetensors",
    }
    for name, target in targets.items():
        snapshot = cached(root, f"org/{name}", COMMIT, FILES)
        (snapshot / "model.safetensors").unlink()
        (snapshot / "model.safetensors").symlink_to(target)
    absolute = cached(root, "org/good", COMMIT, FILES) / "model.safetensors"
    blob = absolute.resolve()
    absolute.unlink()
    absolute.symlink_to(blob)
    odd = (cached(root, "org/blob-is-link", COMMIT, FILES) / "model.safetensors").resolve()
    odd.unlink()
    odd.symlink_to(secret)
    (root / "models--org--whole-link").symlink_to(root / "models--org--good")
    plain(root, "org/plain", FILES)
    (root / "org" / "plain" / "model.safetensors").unlink()
    (root / "org" / "plain" / "model.safetensors").symlink_to(secret)
    (root / "org" / "linked").symlink_to(root / "org" / "plain")
    os.mkfifo(plain(root, "org/fifo", FILES) / "pipe.bin")
    found = scan_library(root)
    assert [c.repo for c in found.candidates] == ["org/good"]
    assert len(found.refused) == len(targets) + 4


_NAMES = st.one_of(
    st.sampled_from(["models--org--name", "refs", "snapshots", "blobs", "main", COMMIT, "config.json", "org"]),
    st.sampled_from(["model.safetensors", "VERSION", "manifests", "sha256", "..", ".", "", "a" * 64, "b.bin"]),
    st.text(max_size=5),
)
_ENTRIES = st.builds(
    DirEntry,
    kind=st.sampled_from(["file", "directory", "link", "other"]),
    stat=st.builds(FileStat, st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)),
    target=st.one_of(st.just(f"../../blobs/{'a' * 64}"), st.lists(_NAMES, max_size=5).map("/".join)),
)


@settings(max_examples=400, deadline=None)
@given(
    st.dictionaries(st.lists(_NAMES, min_size=1, max_size=5).map("/".join), _ENTRIES, max_size=25),
    st.dictionaries(st.lists(_NAMES, min_size=1, max_size=4).map("/".join), st.binary(max_size=60), max_size=4),
    st.booleans(),
)
def test_I10_of_any_listing_only_files_with_valid_names_are_used(
    entries: dict[str, DirEntry], texts: dict[str, bytes], with_model: bool
) -> None:
    if with_model:
        top = "models--org--name"
        entries |= {name: DirEntry("directory") for name in (top, f"{top}/snapshots", f"{top}/snapshots/{COMMIT}")}
    found = recognize(LibraryListing("/root", entries, texts))
    for candidate in found.candidates:
        assert candidate.files
        for file in candidate.files:
            assert entries[file.absolute_path.removeprefix("/root/")].kind == "file"
    known = {f.absolute_path: VerifiedFile(stat=f.stat, sha256="c" * 64) for c in found.candidates for f in c.files}
    for model, accepted in accept_models(found.candidates, known).accepted.items():
        check_manifest(accepted.manifest)
        layout = StorePaths(Path("/store"))
        for f in accepted.manifest.files:
            assert layout.view_file(accepted.manifest, f.path).is_relative_to("/store/views")
        assert accepted.manifest.model == model


@given(st.lists(_NAMES, max_size=6).map("/".join))
def test_I10_no_link_leads_anywhere_but_to_one_name_in_blobs(target: str) -> None:
    found = resolve_cache_link(f"models--o--n/snapshots/{COMMIT}/f", target, "/root")
    assert found is None or (found.startswith("models--o--n/blobs/") and found.count("/") == 2 and ".." not in found)


@given(st.data())
def test_a_model_is_offered_only_when_every_file_was_verified(
    data: st.DataObject,
) -> None:
    """I1 as a property, over arbitrary known hashes."""
    shas = ["a" * 64, "b" * 64]
    seens = [FileStat(1, 1, 1), FileStat(1, 2, 1)]
    listing = LibraryListing("/r", {}, {})
    top = "models--org--name"
    for path in (top, f"{top}/blobs", f"{top}/snapshots", f"{top}/snapshots/{COMMIT}"):
        listing.entries[path] = DirEntry("directory")
    for sha in shas:
        listing.entries[f"{top}/blobs/{sha}"] = DirEntry("file", data.draw(st.sampled_from(seens)))
        link = DirEntry("link", target=f"../../blobs/{sha}")
        listing.entries[f"{top}/snapshots/{COMMIT}/{sha[0]}.bin"] = link
    candidates = recognize(listing).candidates
    states = st.builds(
        VerifiedFile,
        stat=st.sampled_from(seens),
        sha256=st.sampled_from(shas),
        corrupt=st.sampled_from([False, True]),
    )
    verified = data.draw(st.dictionaries(st.sampled_from([f"/r/{top}/blobs/{sha}" for sha in shas]), states))
    verdict = accept_models(candidates, verified)
    good = all(
        (v := verified.get(f.absolute_path)) is not None
        and v.stat == f.stat
        and v.sha256 == f.expected_hash
        and not v.corrupt
        for f in candidates[0].files
    )
    assert bool(verdict.accepted) == good
    assert bool(verdict.accepted) + len(verdict.waiting) + len(verdict.refused) == 1


def test_a_file_with_the_same_stat_and_another_hash_is_corrupt(tmp_path: Path) -> None:
    plain(tmp_path, "me/tuned", FILES)
    file = only(scan_library(tmp_path)).files[0]
    assert not is_corrupt(file, VerifiedFile(stat=file.stat, sha256="a" * 64))
    assert is_corrupt(file, VerifiedFile(stat=file.stat, sha256="a" * 64, corrupt=True))


def test_a_file_that_changed_since_its_listing_is_not_hashed(tmp_path: Path) -> None:
    directory = plain(tmp_path, "me/tuned", FILES)
    file = next(f for f in only(scan_library(tmp_path)).files if f.path == "model.safetensors")
    weights = directory / "model.safetensors"

    def written_meanwhile() -> None:
        weights.write_bytes(b"x" * len(FILES["model.safetensors"]))
        os.utime(weights, ns=(1, 1))

    assert hash_file(file, written_meanwhile) is None
    assert hash_file(file, lambda: None) is None
    weights.unlink()
    weights.symlink_to(directory / "config.json")
    assert hash_file(file, lambda: None) is None


def test_a_library_that_cannot_be_read_has_the_reason(tmp_path: Path) -> None:
    with pytest.raises(LibraryUnreadable, match="No such file"):
        list_library(str(tmp_path / "gone"), lambda: None)
    (tmp_path / "file").write_text("x")
    with pytest.raises(LibraryUnreadable, match="No such file"):
        list_library("~nobody-of-this-name/models", lambda: None)
    with pytest.raises(LibraryUnreadable, match="Not a directory"):
        list_library(str(tmp_path / "file"), lambda: None)


def test_a_library_inside_or_around_the_store_is_refused(tmp_path: Path) -> None:
    store = tmp_path / "home" / "store"
    (store / "views").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "home")
    for root in (store, store / "views", tmp_path, tmp_path / "link", tmp_path / "link" / "store"):
        with pytest.raises(BadInput, match="overlap"):
            reject_overlap([str(root)], store)
    reject_overlap([str(tmp_path / "home" / "models"), str(tmp_path / "gone")], store)
