"""Manifests from outside, hostile ones too."""

from __future__ import annotations

import pytest
from msgspec import structs

from shoal_common.errors import BadInput, BadName
from shoal_common.messages.manifest import Manifest, ManifestFile
from shoal_storage.admission.manifest_check import check_manifest
from tests.storage.store_fixtures import Model

SHA = "ab" * 32
GOOD = Model(
    "org/model", {"config.json": b"{}", "sub/model.safetensors": b"weights"}, by_git=("config.json",)
).manifest


def with_file(path: str = "file", size_bytes: int = 1, sha256: str = SHA, git_sha1: str = "") -> Manifest:
    added = ManifestFile(path=path, size_bytes=size_bytes, sha256=sha256, git_sha1=git_sha1)
    return structs.replace(GOOD, files=[*GOOD.files, added])


def test_an_honest_manifest_passes() -> None:
    check_manifest(GOOD)
    check_manifest(with_file())


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../../x",
        "a//b",
        "./a",
        "a/.",
        "nul\0",
        "a\nb",
        "c:\\x",
        "..",
        "x" * 513,
        "\ud800",
    ],
)
def test_I10_a_path_that_climbs_or_hides_is_refused(path: str) -> None:
    with pytest.raises(BadName):
        check_manifest(with_file(path=path))


@pytest.mark.parametrize(
    "sha256", ["../" * 20, "AB" * 32, SHA[:-1], SHA + "0", "git-" + "a" * 40, "g" * 64, SHA + "\n"]
)
def test_I10_a_blob_is_64_hexadecimal_digits(sha256: str) -> None:
    with pytest.raises(BadName):
        check_manifest(with_file(sha256=sha256))


@pytest.mark.parametrize("git_sha1", ["", "../x", "A" * 40, "a" * 39])
def test_I10_a_git_hash_is_40_hexadecimal_digits(git_sha1: str) -> None:
    with pytest.raises(BadName):
        check_manifest(with_file(sha256="", git_sha1=git_sha1))


@pytest.mark.parametrize(
    "repo", ["", "..", "../..", "org", "org/..", "org/a/b", "org/name@main", "o--x/n", "org/na\0me"]
)
def test_I10_a_repository_is_org_and_name(repo: str) -> None:
    with pytest.raises(BadName):
        check_manifest(structs.replace(GOOD, repo=repo))


@pytest.mark.parametrize("commit", ["", "main", "..", "A" * 40, "a" * 41])
def test_I10_a_commit_is_40_hexadecimal_digits(commit: str) -> None:
    with pytest.raises(BadName):
        check_manifest(structs.replace(GOOD, commit=commit))


@pytest.mark.parametrize("revision", ["", "../x", "a\nb", "x" * 200])
def test_I10_a_revision_is_a_branch_or_a_tag(revision: str) -> None:
    with pytest.raises(BadName):
        check_manifest(structs.replace(GOOD, revisions=["main", revision]))


@pytest.mark.parametrize(
    "manifest",
    [
        with_file(size_bytes=-1),
        structs.replace(with_file(size_bytes=10), files=[*with_file().files, *with_file("other", 2).files[-1:]]),
        with_file(path="config.json"),
        with_file(path="config.json/inside"),
        with_file(path="sub"),
    ],
    ids=["negative size", "one blob, two sizes", "one path twice", "inside a file", "a file where a directory is"],
)
def test_a_manifest_that_contradicts_itself_is_refused(manifest: Manifest) -> None:
    with pytest.raises(BadInput):
        check_manifest(manifest)
