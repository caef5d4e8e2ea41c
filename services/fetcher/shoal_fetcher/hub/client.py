"""The hub: Hugging Face, or any server of its protocol at HF_ENDPOINT.

Listings go through huggingface_hub. File bytes are read by our own client, because the library's download cannot be
shared between nodes, verifies sizes only, and keeps a second copy.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import islice
from pathlib import PurePosixPath
from urllib.parse import quote

import httpx2
import msgspec
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from shoal_common.concurrency.single_flight import SingleFlight
from shoal_common.errors import (
    BadInput,
    BadName,
    Denied,
    Expired,
    HubUnavailable,
    NotFound,
    Refused,
    ShoalError,
    Unsupported,
)
from shoal_common.hub_token import DEFAULT_ENDPOINT, check_token, read_endpoint
from shoal_common.messages.manifest import Manifest, ManifestFile
from shoal_common.names import ModelRef, check_blob, check_commit, check_file_path, is_commit
from shoal_fetcher.errors import RateLimited
from shoal_fetcher.hub.cache import HubBackoff, ListingCache
from shoal_fetcher.hub.environment_transport import RESTART_HINT, is_server_url, without_credentials
from shoal_fetcher.hub.listing import HubCalls
from shoal_fetcher.hub.range_reader import TOKEN_HINT, Body, HttpSource, hub_source, read_range, retry_after_s
from shoal_fetcher.hub.tokens import HubTokens

MAX_FILES = 4000
"""A download's state names each blob and must fit in one message of 1 MiB."""
_LISTING_TIMEOUT_S = 60.0
"""For both calls of the library, and for callers who join a call of another."""
_MAX_FILE_BYTES = 1 << 50


class HubSettings(msgspec.Struct, frozen=True):
    """The hub's address and the fetcher's own token, which never leaves this process (I12)."""

    endpoint: str = DEFAULT_ENDPOINT
    token: str | None = None
    offline: bool = False
    invalid: str = ""
    """Which variable cannot be used, and why: the hub is not asked then. The service runs all the same."""

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> HubSettings:
        """Read HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE, as huggingface_hub names them."""
        offline = environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        endpoint = read_endpoint(environ)
        try:
            token = check_token(environ.get("HF_TOKEN", "")) or None
            check_endpoint(endpoint)
        except BadInput as e:
            return cls(offline=offline, invalid=e.message)
        return cls(endpoint, token, offline)


def check_endpoint(endpoint: str) -> None:
    """Raise BadInput, naming HF_ENDPOINT, if it is no address of a hub."""
    if not is_server_url(endpoint, ("http", "https")):
        raise BadInput(f"HF_ENDPOINT={without_credentials(endpoint)} is not an http:// or https:// address")


class HubClient:
    """Resolves models and reads their files."""

    def __init__(self, settings: HubSettings, client: httpx2.AsyncClient) -> None:
        self._settings, self._client = settings, client
        self._source = hub_source(settings.endpoint)
        self._api = HfApi(endpoint=settings.endpoint, token=False)
        self.tokens = HubTokens(settings.endpoint, settings.token)
        self._backoff, self._listings = HubBackoff(), ListingCache()
        self._calls = HubCalls(settings.endpoint, self._source, client, self._backoff)
        self._commits, self._trees = SingleFlight[str](), SingleFlight[list[ManifestFile]]()

    @property
    def offline(self) -> bool:
        """Whether HF_HUB_OFFLINE forbids requests to the hub."""
        return self._settings.offline

    async def resolve(self, ref: ModelRef) -> Manifest:
        """Return the commit that a revision names now, and its files. Raises NotFound, Denied, HubUnavailable."""
        if self.offline:
            raise HubUnavailable(
                f"no live node has {ref} and HF_HUB_OFFLINE forbids asking the hub: unset it, or pull the model on "
                "a node with a connection"
            )
        self._require_valid()
        token = self.tokens.use(ref.repo)
        try:
            async with asyncio.timeout(_LISTING_TIMEOUT_S):
                commit = ref.revision
                if not is_commit(commit) or self._listings.get(ref.repo, commit) is None:
                    commit = await self._commits(
                        (ref, token), lambda: self._calls.run(lambda: self._commit_of(ref, token))
                    )
                files = await self._files_of(ref, commit, token)
        except Denied as e:
            self.tokens.record_denial(ref.repo, token, e)
            raise
        except TimeoutError:
            raise Expired(
                f"{self._source.name} did not list {ref} within {_LISTING_TIMEOUT_S:.0f} s; try again"
            ) from None
        return Manifest(repo=ref.repo, commit=commit, files=list(files), revisions=[ref.revision])

    def _require_valid(self) -> None:
        if self._settings.invalid:
            raise Refused(f"the hub cannot be asked: {self._settings.invalid}; {RESTART_HINT}")

    async def _files_of(self, ref: ModelRef, commit: str, token: str | None) -> list[ManifestFile]:
        files = self._listings.get(ref.repo, commit)
        if files is None:
            files = await self._trees(
                (ref.repo, commit, token), lambda: self._calls.run(lambda: self._list(ref, commit, token))
            )
            self._listings.put(ref.repo, commit, files)
        return files

    def _commit_of(self, ref: ModelRef, token: str | None) -> str:
        try:
            info = self._api.model_info(ref.repo, revision=ref.revision, token=token or False)
            return check_commit(info.sha or "")
        except Exception as e:
            raise map_hub_error(e, ref, self._source, has_token=bool(token)) from e

    def _list(self, ref: ModelRef, commit: str, token: str | None) -> list[ManifestFile]:
        try:
            entries = self._api.list_repo_tree(ref.repo, recursive=True, revision=commit, token=token or False)
            files = [to_manifest_file(e) for e in islice(filter(is_file, entries), MAX_FILES + 1)]
            check_listing(ref, files)
        except Exception as e:
            raise map_hub_error(e, ref, self._source, has_token=bool(token)) from e
        return files

    def read(self, manifest: Manifest, file: ManifestFile, start: int, end: int) -> AbstractAsyncContextManager[Body]:
        """Read bytes [start, end) of a file. Raises RateLimited at once until the time that the hub has named."""
        if self.offline:
            raise HubUnavailable(f"no live node has {file.path} and HF_HUB_OFFLINE forbids asking the hub: unset it")
        self._require_valid()
        url = f"{self._settings.endpoint}/{manifest.repo}/resolve/{manifest.commit}/{quote(file.path)}"
        token = self.tokens.use(manifest.repo)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._backoff.check(self._source.name)
        reading = read_range(self._client, url, headers, start, end, self._source, file)
        return self._recording_refusals(reading, manifest.repo, token)

    @asynccontextmanager
    async def _recording_refusals(
        self, reading: AbstractAsyncContextManager[Body], repo: str, token: str | None
    ) -> AsyncIterator[Body]:
        try:
            async with reading as body:
                yield body
        except RateLimited as e:
            self._backoff.record(e)
            raise
        except Denied as e:
            self.tokens.record_denial(repo, token, e)
            raise


def is_file(entry: object) -> bool:
    """Return whether a listing's entry is a file."""
    return isinstance(entry, RepoFile)


def to_manifest_file(entry: object) -> ManifestFile:
    """Return a listing's entry as a manifest file, named by sha256 (LFS and Xet), else by git's sha1."""
    assert isinstance(entry, RepoFile)
    path = check_file_path(entry.path)
    size = entry.size if entry.lfs is None else entry.lfs.size
    if type(size) is not int or not 0 <= size <= _MAX_FILE_BYTES:
        raise BadName(f"{size!r} is not a valid size in bytes of {path}")
    if entry.lfs is not None:
        return ManifestFile(path=path, size_bytes=size, sha256=check_blob(entry.lfs.sha256))
    check_blob(f"git-{entry.blob_id}")
    return ManifestFile(path=path, size_bytes=size, git_sha1=entry.blob_id)


def check_listing(ref: ModelRef, files: list[ManifestFile]) -> None:
    """Raise if a listing cannot be a directory of files: too many, a duplicate path, or a file that is a folder."""
    if len(files) > MAX_FILES:
        raise Unsupported(f"{ref} has more than {MAX_FILES} files, the most that Shoal supports")
    paths = {f.path for f in files}
    folders = {str(folder) for path in paths for folder in PurePosixPath(path).parents}
    if len(paths) < len(files) or paths & folders:
        raise BadName(f"two files of {ref} have the same name")


def map_hub_error(error: Exception, ref: ModelRef, source: HttpSource, has_token: bool) -> ShoalError:
    """Return an error of huggingface_hub as one of ours."""
    name = source.name
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, BadName):
        return BadName(f"{name} lists an unsafe name in {ref}: {error.message}")
    if isinstance(error, ShoalError):
        return error
    if isinstance(error, GatedRepoError):
        return Denied(f"{ref} is gated on {name}: accept its terms there, then {TOKEN_HINT}", source="hub")
    if isinstance(error, RevisionNotFoundError):
        return NotFound(f"{ref.repo} has no revision {ref.revision!r} on {name}: check the name after the @")
    if status == 401 or (isinstance(error, HfHubHTTPError) and status == 403):
        hint = "check that the token may read it" if has_token else f"if it is private, {TOKEN_HINT}"
        message = f"{ref.repo} on {name} does not exist or needs a token (HTTP {status}): check the name; {hint}"
        return Denied(message, source="hub")
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return NotFound(f"{ref.repo} is not on {name}: check the name (org/name)")
    if status == 429 and response is not None:
        wait_s = retry_after_s(response.headers)
        return RateLimited(f"{name} limits our requests: retry in {wait_s:.0f} s (HTTP 429)", retry_after_s=wait_s)
    if isinstance(error, OfflineModeIsEnabled):
        return HubUnavailable(f"{ref} is not on this node and HF_HUB_OFFLINE forbids asking the hub: unset it")
    if isinstance(error, HFValidationError):
        return BadName(f"{ref} is not a name that huggingface_hub accepts: {error}")
    if isinstance(error, HfHubHTTPError):
        return HubUnavailable(f"{name} sent HTTP {status} for {ref}; try again later")
    if isinstance(error, OSError | httpx2.HTTPError):
        return HubUnavailable(f"{name} is unreachable for {ref}: {error or type(error).__name__}; check HF_ENDPOINT")
    return HubUnavailable(
        f"{name} sent an invalid listing of {ref} ({type(error).__name__}: {error}); check HF_ENDPOINT"
    )
