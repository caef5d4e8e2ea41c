"""The tiny hub, tested with the unmodified huggingface_hub client and a plain HTTP client."""

import asyncio
import hashlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
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
from huggingface_hub.utils._http import http_backoff, parse_ratelimit_headers

from shoal_demo import DEMO_MODEL, MODELS_DIR
from shoal_demo.app import DemoHub, HubConfig
from shoal_demo.faults import DropAtByte, Faults, RateLimit, UnavailableFault, WrongBytes
from shoal_demo.hub_server import HubNotReadyError, RunningHub, running_hub
from shoal_demo.stats import RequestCounts

MODEL = "toy/numbers"
LFS_FROM_BYTES = 1 << 16
LARGE = random.Random(1).randbytes(3 * (1 << 20) + 12345)
FILES = {
    "README.md": b"# numbers\n",
    "config.json": b'{"model_type": "none"}\n',
    "empty.txt": b"",
    "weights.bin": LARGE,
    "tiny.safetensors": b"small, and large by its name",
    "sub/deep/one.txt": b"one",
    "sub/two.txt": b"two",
    "with space & ümlaut.txt": b"three",
}


def write_files(directory: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def read_files(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    write_files(root / MODEL, FILES)
    return root


@pytest.fixture(scope="module")
def module_hub(root: Path) -> Iterator[RunningHub]:
    with running_hub(root, lfs_from_bytes=LFS_FROM_BYTES) as hub:
        yield hub


@pytest.fixture
def hub(module_hub: RunningHub) -> RunningHub:
    module_hub.reset_faults()
    module_hub.reset_stats()
    return module_hub


@pytest.fixture
def api(hub: RunningHub) -> HfApi:
    return HfApi(endpoint=hub.base_url, token=False)


@pytest.fixture
def web(hub: RunningHub) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=hub.base_url, follow_redirects=True, trust_env=False) as client:
        yield client


def resolve(path: str, revision: str = "main") -> str:
    return f"/{MODEL}/resolve/{revision}/{path}"


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


# Heads and ranges


def test_heads_carry_what_clients_plan_with_and_no_bytes(hub: RunningHub, web: httpx2.Client, api: HfApi) -> None:
    commit = api.model_info(MODEL).sha
    small = web.head(resolve("config.json"))
    content = FILES["config.json"]
    assert small.headers["ETag"] == f'"{git_oid(content)}"'
    assert small.headers["Content-Length"] == str(len(content))
    assert small.headers["X-Repo-Commit"] == commit
    large = web.head(resolve("weights.bin"), follow_redirects=False)
    sha256 = hashlib.sha256(LARGE).hexdigest()
    assert large.status_code == 302
    assert large.headers["Location"].startswith(f"/_lfs/{sha256}")
    assert large.headers["X-Linked-Etag"] == f'"{sha256}"'
    assert large.headers["X-Linked-Size"] == str(len(LARGE))
    assert large.headers["X-Repo-Commit"] == commit
    behind = web.head(large.headers["Location"])
    assert (behind.headers["ETag"], behind.headers["Content-Length"]) == (f'"{sha256}"', str(len(LARGE)))
    assert hub.stats().bytes == 0
    assert hub.stats().requests == RequestCounts(api=1, head=3, get=0)


@pytest.mark.parametrize("path", ["weights.bin", "README.md"])
@pytest.mark.parametrize(
    ("header", "span"),
    [
        ("bytes=0-0", slice(0, 1)),
        ("bytes=2-5", slice(2, 6)),
        ("bytes=3-", slice(3, None)),
        ("bytes=-4", slice(-4, None)),
        ("bytes=1-999999999", slice(1, None)),
        ("bytes=-999999999", slice(0, None)),
    ],
)
def test_range_answers_206_with_exactly_those_bytes(web: httpx2.Client, path: str, header: str, span: slice) -> None:
    content = FILES[path]
    answer = web.get(resolve(path), headers={"Range": header})
    first, end, _ = span.indices(len(content))
    assert answer.status_code == 206
    assert answer.content == content[span]
    assert answer.headers["Content-Range"] == f"bytes {first}-{end - 1}/{len(content)}"
    assert answer.headers["Accept-Ranges"] == "bytes"


@pytest.mark.parametrize("header", [f"bytes={len(LARGE)}-", f"bytes={len(LARGE) + 5}-{len(LARGE) + 9}", "bytes=-0"])
def test_range_beyond_the_file_answers_416_with_its_size(hub: RunningHub, web: httpx2.Client, header: str) -> None:
    answer = web.get(resolve("weights.bin"), headers={"Range": header})
    assert answer.status_code == 416
    assert answer.headers["Content-Range"] == f"bytes */{len(LARGE)}"
    assert hub.stats().bytes == 0


@pytest.mark.parametrize("header", ["bytes=0-1,4-5", "bytes=5-2", "bytes=-", "lines=1-2", "bytes=x-y"])
def test_range_that_makes_no_single_span_is_ignored(web: httpx2.Client, header: str) -> None:
    answer = web.get(resolve("config.json"), headers={"Range": header})
    assert (answer.status_code, answer.content) == (200, FILES["config.json"])


def test_range_of_a_changed_file_answers_with_the_full_file(web: httpx2.Client) -> None:
    same = {"Range": "bytes=2-3", "If-Range": f'"{git_oid(FILES["config.json"])}"'}
    assert web.get(resolve("config.json"), headers=same).status_code == 206
    other = {"Range": "bytes=2-3", "If-Range": '"something else"'}
    assert web.get(resolve("config.json"), headers=other).status_code == 200


# Faults


def test_rate_limit_answers_429_with_the_reset_time_and_stops(hub: RunningHub, api: HfApi) -> None:
    hub.set_faults(Faults(rate_limit=RateLimit(times=2, retry_after_s=7, kinds=("api",))))
    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match="Retry after 7 seconds") as limited:
            api.model_info(MODEL)
        headers = limited.value.response.headers
        assert headers["Retry-After"] == "7"
        parsed = parse_ratelimit_headers(headers)
        assert parsed is not None and (parsed.remaining, parsed.reset_in_seconds) == (0, 7)
    assert api.model_info(MODEL).id == MODEL
    assert hub.faults() == Faults()
    assert hub.stats().answers == {429: 2, 200: 1}


def test_client_that_backs_off_gets_past_a_rate_limit(hub: RunningHub) -> None:
    hub.set_faults(Faults(rate_limit=RateLimit(times=1, retry_after_s=0)))
    assert http_backoff("GET", hub.base_url + resolve("config.json")).status_code == 200


def test_unavailable_answers_503_as_often_as_configured(hub: RunningHub, web: httpx2.Client) -> None:
    hub.set_faults(Faults(unavailable=UnavailableFault(times=2, kinds=("get",))))
    assert web.head(resolve("config.json")).status_code == 200
    assert [web.get(resolve("config.json")).status_code for _ in range(3)] == [503, 503, 200]


def test_drop_at_byte_closes_after_exactly_that_byte(hub: RunningHub, web: httpx2.Client) -> None:
    hub.set_faults(Faults(drop_at_byte=DropAtByte(after_bytes=1_500_000, times=1)))
    got = bytearray()
    with pytest.raises(httpx2.RemoteProtocolError), web.stream("GET", resolve("weights.bin")) as answer:
        for chunk in answer.iter_raw():
            got += chunk
    assert got == LARGE[:1_500_000]
    assert hub.stats().files[f"{MODEL}/weights.bin"].bytes == 1_500_000
    assert web.get(resolve("weights.bin")).content == LARGE


def test_client_resumes_a_dropped_download_with_a_range(
    hub: RunningHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The client keeps only whole chunks, 10 MB by default: with those it would restart this file.
    chunk_bytes = 1 << 16
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", chunk_bytes)
    kept_bytes = 2_000_000 // chunk_bytes * chunk_bytes
    hub.set_faults(Faults(drop_at_byte=DropAtByte(after_bytes=2_000_000, times=1, glob="*/weights.bin")))
    got = hf_hub_download(MODEL, "weights.bin", endpoint=hub.base_url, cache_dir=tmp_path, token=False)
    assert Path(got).read_bytes() == LARGE
    file = hub.stats().files[f"{MODEL}/weights.bin"]
    assert (file.gets, file.ranges) == (2, [f"bytes={kept_bytes}-"])
    assert file.bytes == 2_000_000 + len(LARGE) - kept_bytes


def test_wrong_bytes_flips_one_byte_in_every_answer_that_has_it(hub: RunningHub, web: httpx2.Client) -> None:
    offset = (1 << 20) + 17
    wrong = bytearray(LARGE)
    wrong[offset] ^= 0xFF
    hub.set_faults(Faults(wrong_bytes=WrongBytes(glob="*.bin", offset=offset)))
    assert web.get(resolve("config.json")).content == FILES["config.json"]
    for _ in range(2):
        assert web.get(resolve("weights.bin")).content == wrong
    span = {"Range": f"bytes={offset - 1}-{offset + 1}"}
    assert web.get(resolve("weights.bin"), headers=span).content == wrong[offset - 1 : offset + 2]


def test_wrong_bytes_spends_its_strikes_only_where_they_show(hub: RunningHub, web: httpx2.Client) -> None:
    hub.set_faults(Faults(wrong_bytes=WrongBytes(offset=100, times=1)))
    for span in ("bytes=0-99", "bytes=101-200"):
        first, last = map(int, span.removeprefix("bytes=").split("-"))
        assert web.get(resolve("weights.bin"), headers={"Range": span}).content == LARGE[first : last + 1]
    assert web.get(resolve("weights.bin")).content != LARGE
    assert web.get(resolve("weights.bin")).content == LARGE


def test_bytes_per_s_is_the_rate_of_all_bodies_together(hub: RunningHub, web: httpx2.Client) -> None:
    hub.set_faults(Faults(bytes_per_s=200_000))
    started_s = time.monotonic()
    for span in ("bytes=0-39999", "bytes=40000-79999"):
        assert len(web.get(resolve("weights.bin"), headers={"Range": span}).content) == 40_000
    assert time.monotonic() - started_s >= 0.4 * 0.95


def test_no_range_answers_200_with_the_full_body(hub: RunningHub, web: httpx2.Client) -> None:
    hub.set_faults(Faults(no_range=True))
    answer = web.get(resolve("weights.bin"), headers={"Range": "bytes=5-9"})
    assert (answer.status_code, answer.content) == (200, LARGE)
    assert "Accept-Ranges" not in answer.headers


def test_faults_that_are_not_understood_change_nothing(hub: RunningHub, web: httpx2.Client) -> None:
    hub.set_faults(Faults(no_range=True))
    for body in ('{"no_rnage": true}', '{"bytes_per_s": "fast"}', "faults"):
        answer = web.put("/_faults", content=body)
        assert answer.status_code == 400
        assert "none was set" in answer.json()["error"]
    assert hub.faults() == Faults(no_range=True)


def test_hub_without_admin_has_no_switches(root: Path) -> None:
    async def ask(path: str) -> int:
        transport = httpx2.ASGITransport(DemoHub(HubConfig(root=root, admin=False)).app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://hub") as client:
            return (await client.get(path)).status_code

    assert [asyncio.run(ask(path)) for path in ("/api/models", "/_faults", "/_stats")] == [200, 404, 404]


# Stats


def test_stats_distinguish_paths_ranges_and_kinds(hub: RunningHub, web: httpx2.Client) -> None:
    web.get(f"/api/models/{MODEL}")
    web.head(resolve("config.json"))
    web.get(resolve("config.json"))
    for span in ("bytes=0-9", "bytes=10-29"):
        web.get(resolve("weights.bin"), headers={"Range": span})
    stats = hub.stats()
    assert stats.requests == RequestCounts(api=1, head=1, get=5)
    assert stats.answers == {200: 3, 302: 2, 206: 2}
    assert stats.bytes == len(FILES["config.json"]) + 30
    large = stats.files[f"{MODEL}/weights.bin"]
    assert (large.gets, large.bytes, large.ranges) == (2, 30, ["bytes=0-9", "bytes=10-29"])
    hub.reset_stats()
    assert hub.stats().requests == RequestCounts()


def test_stats_count_what_was_sent_when_the_client_disconnects(tmp_path: Path) -> None:
    size_bytes = 64 << 20
    (tmp_path / "a/large").mkdir(parents=True)
    with (tmp_path / "a/large/w.safetensors").open("wb") as file:
        file.truncate(size_bytes)
    with running_hub(tmp_path) as hub:
        head = httpx2.head(f"{hub.base_url}/a/large/resolve/main/w.safetensors", trust_env=False)
        address = httpx2.URL(hub.base_url)
        assert address.port is not None
        with socket.create_connection((address.host, address.port)) as connection:
            request = f"GET {head.headers['Location']} HTTP/1.1\r\nHost: {address.host}\r\n\r\n"
            connection.sendall(request.encode())
            received_bytes = 0
            while received_bytes < 200_000:
                received_bytes += len(connection.recv(1 << 16))
            while_open = hub.stats().bytes
        # The response headers are less than 2 KiB of what was received.
        assert received_bytes - 2048 <= while_open < size_bytes / 2
        assert hub.stats().bytes < size_bytes / 2


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
