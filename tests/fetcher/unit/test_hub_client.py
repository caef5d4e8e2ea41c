"""Listings become manifests; misbehaving, hostile, unreachable and rate-limiting hubs become one clear line."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import errors, set_client_factory
from huggingface_hub.utils._http import default_client_factory

from shoal_common.errors import BadName, Denied, HubUnavailable, NotFound, Refused, ShoalError, Unsupported
from shoal_common.messages.manifest import Manifest, ManifestFile
from shoal_common.names import ModelRef
from shoal_demo.faults import Faults, RateLimit
from shoal_demo.faults import UnavailableFault as Down
from shoal_demo.hub_server import RunningHub, running_hub
from shoal_fetcher.errors import RateLimited
from shoal_fetcher.hub import client as hub_module
from shoal_fetcher.hub.cache import MAX_CACHED_FILES, HubBackoff, ListingCache
from shoal_fetcher.hub.client import HubClient, HubSettings, map_hub_error
from shoal_fetcher.hub.range_reader import hub_source, make_hub_client
from tests.fetcher.fault_servers import Server, reply, serving
from tests.fetcher.hub_repos import make_model

REF = ModelRef("org/many")
COMMIT = "c" * 40
SHA256 = "a" * 64


@pytest.fixture(scope="module")
def paged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    """A hub that lists three files per page."""
    root = tmp_path_factory.mktemp("paged")
    make_model(root, REF.repo, {f"part/{i}.json": b"%d" % i for i in range(10)} | {"model.safetensors": b"weights"})
    with running_hub(root, page_size=3) as running:
        yield running


@pytest.fixture(autouse=True)
def healthy(paged: RunningHub) -> Iterator[None]:
    """Each test finds a healthy hub, and restores huggingface_hub's client, of which a process has one."""
    yield
    paged.reset_faults()
    set_client_factory(default_client_factory)


async def resolve(endpoint: str, ref: ModelRef = REF, **settings: Any) -> Any:
    """Return the manifest from a hub."""
    async with make_hub_client() as client:
        return await HubClient(HubSettings(endpoint=endpoint, **settings), client).resolve(ref)


async def test_a_paged_listing_is_a_manifest_with_every_file_by_hash(paged: RunningHub) -> None:
    manifest = await resolve(paged.base_url)
    assert manifest.repo == REF.repo and len(manifest.commit) == 40 and manifest.revisions == ["main"]
    assert sorted(f.path for f in manifest.files) == sorted(
        ["model.safetensors", *(f"part/{i}.json" for i in range(10))]
    )
    by_path = {f.path: f for f in manifest.files}
    assert len(by_path["model.safetensors"].sha256) == 64 and by_path["model.safetensors"].size_bytes == 7
    assert by_path["part/3.json"].blob == f"git-{by_path['part/3.json'].git_sha1}" and not manifest.sealed


async def test_a_commit_can_be_asked_for(paged: RunningHub) -> None:
    commit = (await resolve(paged.base_url)).commit
    assert (await resolve(paged.base_url, ModelRef(REF.repo, commit))).commit == commit


async def test_what_the_hub_does_not_have_is_a_one_line_error(paged: RunningHub) -> None:
    with pytest.raises(NotFound, match=r"org/none is not on hub .*check the name"):
        await resolve(paged.base_url, ModelRef("org/none"))
    with pytest.raises(NotFound, match="org/many has no revision 'v9'"):
        await resolve(paged.base_url, ModelRef(REF.repo, "v9"))


async def test_a_hub_that_wants_a_token_is_an_error_naming_the_setting(paged: RunningHub) -> None:
    paged.set_faults(Faults(require_token="right"))
    with pytest.raises(Denied, match="HF_TOKEN=hf_… shoal pull"):
        await resolve(paged.base_url)
    with pytest.raises(Denied, match="check that the token may read it"):
        await resolve(paged.base_url, token="wrong")
    assert (await resolve(paged.base_url, token="right")).files


async def test_I7_a_busy_or_broken_hub_fails_without_hidden_retries(
    paged: RunningHub,
) -> None:
    paged.set_faults(Faults(rate_limit=RateLimit(times=1, retry_after_s=77)))
    with pytest.raises(RateLimited) as limited:
        await resolve(paged.base_url)
    assert limited.value.retry_after_s == 77
    paged.set_faults(Faults(unavailable=Down(times=1)))
    with pytest.raises(HubUnavailable, match="503"):
        await resolve(paged.base_url)
    assert (await resolve(paged.base_url)).files  # one fault, one error: nobody retried


async def test_a_commit_is_listed_once_and_a_branch_again_by_etag(paged: RunningHub) -> None:
    async with make_hub_client() as client:
        hub = HubClient(HubSettings(endpoint=paged.base_url), client)
        paged.reset_stats()
        first = await hub.resolve(REF)
        asked = paged.stats().requests.api
        assert await hub.resolve(REF) == first
        assert paged.stats().requests.api == asked + 1 and paged.stats().answers[304] == 1
        again = await hub.resolve(ModelRef(REF.repo, first.commit))
        assert again.files == first.files and again.revisions == [first.commit]
        assert paged.stats().requests.api == asked + 1, "a commit never changes its meaning"


async def test_concurrent_callers_of_one_listing_share_its_answer(paged: RunningHub) -> None:
    async with make_hub_client() as client:
        hub = HubClient(HubSettings(endpoint=paged.base_url), client)
        paged.reset_stats()
        alone = await hub.resolve(REF)
        asked = paged.stats().requests.api
        hub = HubClient(HubSettings(endpoint=paged.base_url), client)
        paged.reset_stats()
        leaving = asyncio.ensure_future(hub.resolve(REF))
        others = [asyncio.ensure_future(hub.resolve(REF)) for _ in range(9)]
        await asyncio.sleep(0)
        leaving.cancel()
        assert await asyncio.gather(*others) == [alone] * 9, "one that leaves takes it from nobody"
        assert paged.stats().requests.api == asked


async def test_a_rate_limit_holds_back_every_request_until_its_time(paged: RunningHub) -> None:
    async with make_hub_client() as client:
        hub = HubClient(HubSettings(endpoint=paged.base_url), client)
        manifest = await hub.resolve(REF)
        file = next(f for f in manifest.files if f.sha256)
        paged.set_faults(Faults(rate_limit=RateLimit(times=1, retry_after_s=600, kinds=("get",))))
        with pytest.raises(RateLimited):
            async with hub.read(manifest, file, 0, 7):
                pass
        paged.reset_faults()
        paged.reset_stats()
        with pytest.raises(RateLimited) as held:
            await hub.resolve(ModelRef("org/other"))
        assert 0 < held.value.retry_after_s <= 600 and "limits our requests: retry in" in held.value.message
        with pytest.raises(RateLimited):
            hub.read(manifest, file, 0, 7)
        assert (paged.stats().requests.api, paged.stats().requests.get) == (0, 0)
        assert (await hub.resolve(ModelRef(REF.repo, manifest.commit))).files, "what is known needs no request"


def test_I7_backoff_ends_at_the_named_time_and_cache_is_bounded() -> None:
    now_s = 100.0
    hold = HubBackoff(lambda: now_s)
    hold.check("hub")
    hold.record(RateLimited("wait", retry_after_s=30.0))
    hold.record(RateLimited("wait", retry_after_s=5.0))
    now_s = 129.0
    with pytest.raises(RateLimited):
        hold.check("hub")
    now_s = 130.0
    hold.check("hub")
    listings, many = ListingCache(), [ManifestFile(path="x", size_bytes=1, sha256=SHA256)] * (MAX_CACHED_FILES // 4)
    for number in range(9):
        listings.put("org/m", f"{number:040x}", many)
        assert listings.get("org/m", "0" * 40) is not None, "what is used stays"
    kept = [n for n in range(9) if listings.get("org/m", f"{n:040x}") is not None]
    assert kept == [0, 6, 7, 8]


async def test_offline_means_that_nothing_is_asked() -> None:
    async with serving({}) as server:
        with pytest.raises(HubUnavailable, match="HF_HUB_OFFLINE"):
            await resolve(server.url, offline=True)
        async with make_hub_client() as client:
            offline = HubClient(HubSettings(endpoint=server.url, offline=True), client)
            manifest = Manifest(repo="a/b", commit=COMMIT, files=[])
            with pytest.raises(HubUnavailable, match="HF_HUB_OFFLINE"):
                offline.read(manifest, ManifestFile(path="x", size_bytes=1, sha256=SHA256), 0, 1)
    assert not server.asked


async def test_an_unreachable_hub_is_a_one_line_error() -> None:
    async with serving({}) as server:
        pass
    with pytest.raises(HubUnavailable, match="is unreachable"):
        await resolve(server.url)


def lfs(path: Any = "model.safetensors", size: Any = 7, oid: Any = SHA256) -> dict[str, Any]:
    return {
        "type": "file",
        "path": path,
        "size": size,
        "oid": "b" * 40,
        "lfs": {"oid": oid, "size": size, "pointerSize": 1},
    }


def small(path: Any = "config.json", size: Any = 7, oid: Any = "b" * 40) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": size, "oid": oid}


def listing(*files: dict[str, Any], sha: Any = COMMIT) -> dict[str, object]:
    """A hub with one model with this listing."""
    return {
        "/api/models/org/many/revision/main": {"id": "org/many", "sha": sha, "siblings": [], "tags": []},
        f"/api/models/org/many/tree/{COMMIT}?recursive=true&expand=false": list(files),
    }


async def resolve_from(server: Server) -> Any:
    return await resolve(server.url)


@pytest.mark.parametrize(
    "path",
    [
        "../up",
        "/etc/passwd",
        "a/../../b",
        "a//b",
        ".",
        "..",
        "",
        "c:\\x",
        "a\0b",
        "a\nb",
        "x" * 600,
        "a/" + "y" * 256,
    ],
)
async def test_I10_a_listing_with_a_hostile_path_is_refused_entirely(path: str) -> None:
    async with serving(listing(lfs(), small(path))) as server:
        with pytest.raises(BadName, match="lists an unsafe name in org/many"):
            await resolve_from(server)


@pytest.mark.parametrize(
    "entry",
    [
        *[lfs(oid="../../x"), lfs(oid="A" * 64), lfs(oid="a" * 63), small(oid="x" * 40), small(oid="../etc/passwd")],
        *[lfs(size=-1), lfs(size=1 << 60), lfs(size=1.5), lfs(size=None), lfs(size="7"), small(size=True)],
    ],
)
async def test_I10_a_listing_with_a_hostile_hash_or_size_is_refused(entry: dict[str, Any]) -> None:
    async with serving(listing(entry)) as server:
        with pytest.raises(BadName):
            await resolve_from(server)


@pytest.mark.parametrize("sha", [None, "", "main", "../" + "a" * 37, "A" * 40])
async def test_I10_a_commit_that_is_none_is_refused(sha: object) -> None:
    async with serving(listing(lfs(), sha=sha)) as server:
        with pytest.raises(BadName):
            await resolve_from(server)


@pytest.mark.parametrize(
    "files", [[small("a"), lfs("a")], [small("a"), small("a/b")], [small("a/b"), small("a/b/c/d")]]
)
async def test_I10_files_that_cannot_share_a_directory_are_refused(files: list[dict[str, Any]]) -> None:
    async with serving(listing(*files)) as server:
        with pytest.raises(BadName):
            await resolve_from(server)


async def test_I2_a_listing_that_is_too_long_is_refused_and_not_cut() -> None:
    names = [small(f"{i}.json") for i in range(hub_module.MAX_FILES + 1)]
    async with serving(listing(*names)) as server:
        with pytest.raises(Unsupported, match="more than 4000 files"):
            await resolve_from(server)
    async with serving(listing(*names[1:])) as server:
        assert len((await resolve_from(server)).files) == hub_module.MAX_FILES


@pytest.mark.parametrize("body", [b"<html>hotel wifi, please log in</html>", b"[]", b'{"id": 7}', b"\xff", b""])
async def test_a_server_that_is_no_hub_is_reported_as_such(body: bytes) -> None:
    async with serving(reply(200, body)) as server:
        with pytest.raises(ShoalError) as caught:
            await resolve_from(server)
    assert isinstance(caught.value, HubUnavailable | BadName) and "\n" not in caught.value.message


def test_every_huggingface_hub_exception_maps_to_ours() -> None:
    """Also a class that nothing handles by name says what it was and what to check."""
    source = hub_source("https://hub.example")
    unmapped = set()
    for name, kind in inspect.getmembers(errors, inspect.isclass):
        if not issubclass(kind, Exception):
            continue
        error: Any = kind.__new__(kind)
        if issubclass(kind, errors.HfHubHTTPError):
            error.response = httpx2.Response(418, request=httpx2.Request("GET", "https://hub.example"))
        ours = map_hub_error(error, REF, source, has_token=False)
        assert isinstance(ours, ShoalError)
        if "an invalid listing" in ours.message:
            unmapped.add(name)
            assert name in ours.message
    assert unmapped == UNUSED


# Of parts of huggingface_hub that are not used here: its cache, Xet, CLI, sandboxes, logins, inference. A new
# class in a later version fails the test: decide whether a listing can raise it.
UNUSED = {
    "CLIError",
    "CLIExtensionInstallError",
    "CacheNotFound",
    "CachedRepoTreeNotFoundError",
    "ConfirmationError",
    "CorruptedCacheException",
    "DDUFCorruptedFileError",
    "DDUFError",
    "DDUFExportError",
    "DDUFInvalidEntryNameError",
    "DeviceCodeError",
    "EntryNotFoundError",
    "FileDuplicationError",
    "HfUriError",
    "InferenceEndpointError",
    "NotASafetensorsRepoError",
    "OIDCError",
    "RevisionResolutionError",
    "SafetensorsParsingError",
    "SandboxCommandError",
    "SandboxError",
    "StrictDataclassClassValidationError",
    "StrictDataclassDefinitionError",
    "StrictDataclassError",
    "StrictDataclassFieldValidationError",
    "XetDownloadError",
}


@pytest.mark.parametrize(
    ("environ", "settings"),
    [
        ({}, HubSettings()),
        ({"HF_ENDPOINT": "http://hub/"}, HubSettings(endpoint="http://hub")),
        ({"HF_TOKEN": "t"}, HubSettings(token="t")),
        ({"HF_TOKEN": " hf_x\n"}, HubSettings(token="hf_x")),
        ({"HF_TOKEN": "\n"}, HubSettings()),
        ({"HF_HUB_OFFLINE": "1"}, HubSettings(offline=True)),
        ({"HF_HUB_OFFLINE": "yes"}, HubSettings(offline=True)),
        ({"HF_HUB_OFFLINE": "0"}, HubSettings()),
    ],
)
def test_the_environment_is_read_as_huggingface_hub_reads_it(environ: dict[str, str], settings: HubSettings) -> None:
    assert HubSettings.read(environ) == settings


@pytest.mark.parametrize("token", ["hf_x\nX-Header: y", "hf_x y", "hf_ü", "hf_x\x00"])
def test_a_token_that_is_no_header_is_refused_unread(token: str) -> None:
    settings = HubSettings.read({"HF_TOKEN": token})
    assert "HF_TOKEN" in settings.invalid and token not in settings.invalid and "hf_" not in settings.invalid


@pytest.mark.parametrize("endpoint", ["hub.example", "http://hub:99999", "http://[hub", "ftp://hub", "http://"])
async def test_an_endpoint_that_is_none_is_named_when_the_hub_is_asked(endpoint: str) -> None:
    async with make_hub_client() as client:
        hub = HubClient(HubSettings.read({"HF_ENDPOINT": endpoint}), client)
        with pytest.raises(Refused, match="HF_ENDPOINT"):
            await hub.resolve(REF)


def test_the_tests_repositories_are_where_the_hub_reads_them(tmp_path: Path) -> None:
    make_model(tmp_path, "org/name", {"a/b": b"x"})
    assert (tmp_path / "org" / "name" / "a" / "b").read_bytes() == b"x"
