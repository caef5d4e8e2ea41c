"""File systems that take two names for one, by case or by Unicode's forms, in a model of their names."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from shoal_common.errors import BadInput
from shoal_common.messages.manifest import ManifestFile
from shoal_common.names import ModelId, model_id
from shoal_common.store.store_paths import StorePaths, model_file_name, model_from_file_name
from shoal_storage.admission.manifest_check import check_layout
from shoal_storage.admission.name_folding import NameFolding
from shoal_storage.store.folding_probe import read_folding
from tests.storage.store_fixtures import Model

MAC = NameFolding(case=True, forms=True)
LINUX = NameFolding()
MAC_WITH_CASE = NameFolding(forms=True)
COMMIT = "c" * 40
PARTS = st.from_regex(r"[aAbBzZ_0](?:[aAbB._-]?[aAbB0_])?", fullmatch=True).filter(
    lambda part: ".." not in part and "--" not in part
)
MODELS = st.builds(lambda org, name: model_id(f"{org}/{name}", COMMIT), PARTS, PARTS)
COMPOSED, DECOMPOSED = "caf\u00e9.json", "cafe\u0301.json"


def folded_paths(model: ModelId) -> set[str]:
    """All paths about a model, as a file system that ignores case sees them."""
    layout = StorePaths(Path("/s"))
    about = (layout.manifest, layout.view, layout.pin, layout.use, layout.reservation, layout.shard)
    return {MAC.fold(str(path(model))) for path in (*about, layout.library_model)}


@given(MODELS, MODELS)
def test_I10_two_models_share_no_path_where_case_is_ignored(one: ModelId, other: ModelId) -> None:
    assert one == other or not folded_paths(one) & folded_paths(other)


def test_names_that_differ_in_capitals_share_no_path() -> None:
    assert not folded_paths(model_id("Shoal/Tiny-Fish", COMMIT)) & folded_paths(model_id("shoal/tiny-fish", COMMIT))


@given(MODELS)
def test_a_file_name_tells_its_model(model: ModelId) -> None:
    assert model_from_file_name(model_file_name(model)) == model


def test_the_longest_names_fit_a_directory_entry() -> None:
    longest = model_id(f"{'A' * 90}/{'b' * 19}", COMMIT)
    assert len(f".{model_file_name(longest)}.json.new") <= 255


@pytest.mark.parametrize(
    ("paths", "folding", "clash"),
    [
        (["README.md", "readme.md"], MAC, ("README.md", "readme.md")),
        (["README.md", "readme.md"], LINUX, None),
        (["README.md", "readme.md"], MAC_WITH_CASE, None),
        ([COMPOSED, DECOMPOSED], MAC, (DECOMPOSED, COMPOSED)),
        ([COMPOSED, DECOMPOSED], MAC_WITH_CASE, (DECOMPOSED, COMPOSED)),
        ([COMPOSED, DECOMPOSED], LINUX, None),
        (["A", "a/config.json"], MAC, ("A", "a/config.json")),
        (["A/x", "a/y"], MAC, None),
        (["stra\u00dfe", "STRASSE"], MAC, ("STRASSE", "stra\u00dfe")),
    ],
)
def test_two_files_that_are_one_name_are_told(
    paths: list[str], folding: NameFolding, clash: tuple[str, str] | None
) -> None:
    assert folding.clash(paths) == clash


TREES = st.lists(st.sampled_from(["a", "A", "\u00e9", "e\u0301", "E\u0301", "a/b", "A/b", "a/B", "b"]), unique=True)


@given(TREES, st.sampled_from([MAC, LINUX, MAC_WITH_CASE]))
def test_what_has_no_clash_keeps_all_its_files(paths: list[str], folding: NameFolding) -> None:
    files = {folding.fold(path): path for path in paths}
    below_a_file = any(folded.startswith(f"{other}/") for folded in files for other in files)
    assert (folding.clash(paths) is None) == (len(files) == len(paths) and not below_a_file)


def test_a_refusal_names_the_two_files(apples: Model) -> None:
    added = [ManifestFile(path=path, size_bytes=1, sha256="ab" * 32) for path in ("README.md", "readme.md")]
    manifest = structs.replace(apples.manifest, files=[*apples.manifest.files, *added])
    check_layout(manifest, LINUX)
    with pytest.raises(BadInput, match=r"'README\.md' and 'readme\.md'"):
        check_layout(manifest, MAC)


def test_a_probe_tells_what_this_disk_ignores_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    (tmp_path / COMPOSED).touch()
    has_forms = (tmp_path / unicodedata.normalize("NFD", COMPOSED)).exists()
    assert read_folding(tmp_path) == NameFolding(case=(tmp_path / "X").exists(), forms=has_forms)
    assert {path.name for path in tmp_path.iterdir()} == {"x", COMPOSED}


def test_a_disk_that_cannot_be_probed_counts_as_one_that_folds(tmp_path: Path) -> None:
    assert read_folding(tmp_path / "missing") == MAC
