"""The tiny hub, tested with the unmodified huggingface_hub client and a plain HTTP client."""

import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile, RepoFolder

from shoal_demo import DEMO_MODEL, MODELS_DIR
from shoal_demo.faults import Faults
from shoal_demo.hub_server import HubNotReadyError, RunningHub, running_hub
from tests.hub.hub_fixtures import FILES, LARGE, LFS_FROM_BYTES, MODEL, git_oid, read_files, write_files

# The unmodified client


def test_client_downloads_the_tiny_model_with_each_byte_once(tmp_path: Path) -> None:
    expected = read_files(MODELS_DIR / DEMO_MODEL)
    with running_hub(process=True) as hub:
        got = snapshot_download(DEMO_MODEL, endpoint=hub.base_url, cache_dir=tmp_path, token=False)
        stats = hub.stats()
    assert read_files(Path(got)) == expected
    assert stats.bytes == sum(map(len, expected.values()))
    assert {name: (file.gets, file.bytes, file.ranges) for name, file in stats.files.items()} == {
        f"{DEMO_MODEL}/{path}": (1, len(content), []) for path, content in expected.items()
    }


def test_client_downloads_folders_odd_names_and_empty_files(hub: RunningHub, tmp_path: Path) -> None:
    got = snapshot_download(MODEL, endpoint=hub.base_url, cache_dir=tmp_path, token=False)
    assert read_files(Path(got)) == FILES


def test_model_info_names_the_commit_and_all_files(api: HfApi) -> None:
    info = api.model_info(MODEL, files_metadata=True)
    assert info.id == MODEL
    assert info.sha is not None and len(info.sha) == 40
    assert info.siblings is not None
    found = {sibling.rfilename: sibling for sibling in info.siblings}
    assert {name: sibling.size for name, sibling in found.items()} == {k: len(v) for k, v in FILES.items()}
    large = found["weights.bin"].lfs
    assert large is not None and large.sha256 == hashlib.sha256(LARGE).hexdigest()
    for revision in ("main", info.sha):
        assert api.model_info(MODEL, revision=revision).sha == info.sha


def test_tree_carries_sizes_and_the_hashes_clients_verify_with(api: HfApi) -> None:
    entries = [entry for entry in api.list_repo_tree(MODEL, recursive=True) if isinstance(entry, RepoFile)]
    assert {entry.path: entry.size for entry in entries} == {name: len(content) for name, content in FILES.items()}
    for entry in entries:
        content = FILES[entry.path]
        if len(content) >= LFS_FROM_BYTES or entry.path.endswith(".safetensors"):
            assert entry.lfs is not None
            assert (entry.lfs.sha256, entry.lfs.size) == (hashlib.sha256(content).hexdigest(), len(content))
        else:
            assert (entry.lfs, entry.blob_id) == (None, git_oid(content))
        assert entry.xet_hash is None


def test_tree_without_recursion_shows_one_folder_only(api: HfApi) -> None:
    top = {entry.path: type(entry) for entry in api.list_repo_tree(MODEL)}
    assert top["sub"] is RepoFolder
    assert not any(path.startswith("sub/") for path in top)
    assert {entry.path for entry in api.list_repo_tree(MODEL, "sub")} == {"sub/deep", "sub/two.txt"}
    assert [entry.path for entry in api.list_repo_tree(MODEL, "sub/deep")] == ["sub/deep/one.txt"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(MODEL, "nowhere"))


def test_a_tree_in_pages_is_complete(root: Path, api: HfApi) -> None:
    whole = [entry.path for entry in api.list_repo_tree(MODEL, recursive=True)]
    with running_hub(root, page_size=3) as paged:
        other = HfApi(endpoint=paged.base_url, token=False)
        assert [entry.path for entry in other.list_repo_tree(MODEL, recursive=True)] == whole
        assert paged.stats().requests.api == -(-len(whole) // 3)


def test_models_can_be_listed_and_searched(api: HfApi) -> None:
    assert [model.id for model in api.list_models()] == [MODEL]
    assert [model.id for model in api.list_models(search="NUMB")] == [MODEL]
    assert list(api.list_models(search="whale")) == []


def test_commit_follows_the_content_and_nothing_else(tmp_path: Path) -> None:
    write_files(tmp_path / "a/one", {"x.txt": b"1"})
    write_files(tmp_path / "a/two", {"x.txt": b"1"})
    with running_hub(tmp_path) as hub:
        api = HfApi(endpoint=hub.base_url, token=False)
        first = api.model_info("a/one").sha
        assert api.model_info("a/two").sha == first
        write_files(tmp_path / "a/one", {"x.txt": b"22"})
        assert api.model_info("a/one").sha != first
        with pytest.raises(RevisionNotFoundError):
            api.model_info("a/one", revision=first)


# Errors


def test_unknown_repository_raises_repository_not_found(hub: RunningHub, api: HfApi, tmp_path: Path) -> None:
    for model in ("toy/absent", "nobody/numbers"):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info(model)
        with pytest.raises(RepositoryNotFoundError):
            snapshot_download(model, endpoint=hub.base_url, cache_dir=tmp_path, token=False)


def test_unknown_revision_raises_revision_not_found(hub: RunningHub, api: HfApi, tmp_path: Path) -> None:
    for revision in ("v2", "refs/pr/1", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            api.model_info(MODEL, revision=revision)
        with pytest.raises(RevisionNotFoundError):
            list(api.list_repo_tree(MODEL, revision=revision))
        with pytest.raises(RevisionNotFoundError):
            hf_hub_download(
                MODEL, "config.json", revision=revision, endpoint=hub.base_url, cache_dir=tmp_path, token=False
            )


def test_unknown_file_raises_entry_not_found(hub: RunningHub, tmp_path: Path) -> None:
    for path in ("absent.json", "sub", "žába.txt"):
        with pytest.raises(EntryNotFoundError):
            hf_hub_download(MODEL, path, endpoint=hub.base_url, cache_dir=tmp_path, token=False)


def test_missing_token_is_401_like_a_missing_repository(api: HfApi, hub: RunningHub) -> None:
    hub.set_faults(Faults(require_token="secret"))
    with pytest.raises(RepositoryNotFoundError) as refused:
        api.model_info(MODEL)
    assert refused.value.response.status_code == 401
    with pytest.raises(HfHubHTTPError) as wrong:
        api.model_info(MODEL, token="guess")
    assert wrong.value.response.status_code == 401
    assert not isinstance(wrong.value, RepositoryNotFoundError)
    assert api.model_info(MODEL, token="secret").id == MODEL


def test_token_opens_the_hub_and_never_travels_to_the_lfs_host(root: Path, tmp_path: Path) -> None:
    with running_hub(root, lfs_from_bytes=LFS_FROM_BYTES, token="secret", other_lfs_host=True) as hub:
        got = snapshot_download(MODEL, endpoint=hub.base_url, cache_dir=tmp_path, token="secret")
        stats = hub.stats()
        bare = httpx2.get(f"{hub.base_url}/_lfs/{hashlib.sha256(LARGE).hexdigest()}", trust_env=False)
    assert read_files(Path(got)) == FILES
    assert stats.authorized_lfs_requests == 0
    assert bare.status_code == 401, "an address without a signature needs the token"


def test_gated_model_shows_its_metadata_and_refuses_its_files(hub: RunningHub, api: HfApi, tmp_path: Path) -> None:
    hub.set_faults(Faults(gated=("toy/*",)))
    assert api.model_info(MODEL).id == MODEL
    with pytest.raises(GatedRepoError):
        hf_hub_download(MODEL, "config.json", endpoint=hub.base_url, cache_dir=tmp_path, token=False)


@pytest.mark.parametrize(
    "path",
    [
        "/api/models/..%2f..%2fetc/passwd",
        "/api/models/toy/%2e%2e",
        "/..%2f/numbers/resolve/main/config.json",
        f"/{MODEL}/resolve/main/..%2f..%2f..%2fsecret",
        f"/{MODEL}/resolve/main/%2fetc%2fpasswd",
        f"/{MODEL}/resolve/main/line%0d%0aX-Injected: 1",
        "/_lfs/" + "0" * 64,
        "/_lfs/not-a-hash",
        "/",
    ],
)
def test_hostile_names_are_simply_not_found(web: httpx2.Client, path: str) -> None:
    answer = web.get(path)
    assert answer.status_code == 404
    assert answer.headers.get("X-Error-Code", "RepoNotFound") in ("RepoNotFound", "EntryNotFound")
    assert "X-Injected" not in answer.headers


# Running it


def test_hub_as_a_program_writes_its_port_and_ends_on_sigterm(root: Path, tmp_path: Path) -> None:
    ports = tmp_path / "ports.json"
    command = [sys.executable, "-m", "shoal_demo.hub", "--root", str(root), "--port", "0", "--ports-file", str(ports)]
    demo = Path(MODELS_DIR).parent.parent
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=demo) as program:
        assert program.stdout is not None
        line = program.stdout.readline()
        written = httpx2.Response(200, content=ports.read_bytes()).json()
        assert written["base_url"] in line
        answer = httpx2.get(f"{written['base_url']}/api/models", trust_env=False)
        assert [model["id"] for model in answer.json()] == [MODEL]
        program.send_signal(signal.SIGTERM)
        assert program.wait(45) in (0, -signal.SIGTERM)


def test_hub_that_cannot_start_is_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(HubNotReadyError, match="did not answer"), running_hub(tmp_path / "absent", process=True):
        pass
