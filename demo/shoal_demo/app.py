"""The ASGI application of the tiny hub: serves repositories of a directory in the Hugging Face hub's protocol.

It serves `<root>/<org>/<name>/...` to the unmodified huggingface_hub client, and can inject the faults of a real hub.
The endpoints /_faults and /_stats have no authentication and are for the demo and tests only. /_lfs/ belongs to the
protocol: large files are redirected there.
"""

import asyncio
import hashlib
import hmac
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from shoal_demo import MODELS_DIR
from shoal_demo.faults import ActiveFaults, Faults, Kind
from shoal_demo.repo_tree import Repository, RepoStore, TreeEntry
from shoal_demo.response_body import BodyPlan, BodyRateLimiter, FileBody, RangeNotSatisfiableError, parse_range
from shoal_demo.stats import StatsBoard
from shoal_demo.url_parsing import FileTarget, InfoTarget, LfsTarget, ListTarget, Target, TreeTarget, parse_target

# A longer body is a mistake of the caller.
MAX_ADMIN_BODY_BYTES = 1 << 16

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class HubConfig:
    """The fixed configuration of a hub."""

    root: Path = MODELS_DIR
    page_size: int = 1000
    """Items per page of a tree listing."""
    lfs_from_bytes: int = 1 << 20
    """Files of at least this size are LFS files; *.safetensors always are."""
    lfs_base_url: str | None = None
    """Base URL that LFS files are redirected to, such as another host name of this hub; None: the same host."""
    token: str | None = None
    """The bearer token that every request needs; None: no token is needed."""
    admin: bool = True
    """Whether /_faults and /_stats exist."""


class HubError(Exception):
    """An error response: its status, the code that huggingface_hub evaluates, and a message with a hint."""

    def __init__(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        # The message may quote a name from the request, and a header holds printable ASCII only.
        printable = "".join(letter if " " <= letter <= "~" else "?" for letter in message)
        self.headers = {"X-Error-Message": printable, **(headers or {})}
        if code is not None:
            self.headers["X-Error-Code"] = code


class DemoHub:
    """One hub: its state and endpoints. `app` is the ASGI application."""

    def __init__(self, config: HubConfig, faults: Faults | None = None) -> None:
        self.config = config
        self.faults = ActiveFaults(faults)
        self.stats = StatsBoard()
        self._store = RepoStore(config.root, config.lfs_from_bytes)
        # One thread scans and hashes: nothing is hashed twice, and file bodies have all other threads.
        self._scanner = ThreadPoolExecutor(1, thread_name_prefix="hub-scan")
        self._pacer = BodyRateLimiter()
        self._secret = secrets.token_bytes(32)
        routes = [Route("/{path:path}", self._answer, methods=["GET"])]
        if config.admin:
            routes = [
                Route("/_faults", self._admin_faults, methods=["GET", "PUT", "DELETE"]),
                Route("/_stats", self._admin_stats, methods=["GET", "DELETE"]),
                *routes,
            ]
        self.app = Starlette(routes=routes, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        self._scanner.shutdown(wait=False, cancel_futures=True)

    async def _scan(self, read: Callable[..., _Result], *arguments: Any) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._scanner, read, *arguments)

    async def _admin_faults(self, request: Request) -> Response:
        """Demo and tests only: read, replace or reset the faults."""
        if request.method == "PUT":
            body = await request.body()
            try:
                if len(body) > MAX_ADMIN_BODY_BYTES:
                    raise msgspec.ValidationError(f"more than {MAX_ADMIN_BODY_BYTES} bytes")
                self.faults.set(msgspec.json.decode(body, type=Faults))
            except msgspec.DecodeError as error:
                return JSONResponse({"error": f"invalid faults, none was set: {error}"}, 400)
        elif request.method == "DELETE":
            self.faults.set(Faults())
        return _json(msgspec.json.encode(self.faults.get()))

    async def _admin_stats(self, request: Request) -> Response:
        """Demo and tests only: read or reset the counters."""
        if request.method == "DELETE":
            self.stats.reset()
        return _json(msgspec.json.encode(self.stats.get()))

    async def _answer(self, request: Request) -> Response:
        target = parse_target(_raw_path(request))
        kind: Kind = "api"
        if isinstance(target, FileTarget | LfsTarget):
            kind = "head" if request.method == "HEAD" else "get"
        self.stats.count_request(kind)
        try:
            self._refuse_by_fault(kind)
            self._check_token(request, target)
            self._check_private(request, target)
            response = await self._answer_target(request, target)
        except HubError as error:
            response = JSONResponse({"error": str(error)}, error.status, error.headers)
        self.stats.count_answer(response.status_code)
        return response

    async def _answer_target(self, request: Request, target: Target | None) -> Response:
        match target:
            case ListTarget():
                return await self._list_models(request)
            case InfoTarget():
                return await self._model_info(request, target)
            case TreeTarget():
                return await self._tree(request, target)
            case FileTarget():
                return await self._file(request, target)
            case LfsTarget():
                return await self._lfs(request, target)
        raise HubError(404, "RepoNotFound", "no such route; models are named org/name")

    def _refuse_by_fault(self, kind: Kind) -> None:
        if self.faults.take_unavailable(kind):
            raise HubError(503, None, "the hub is unavailable (injected fault); try again later")
        reset_s = self.faults.take_rate_limit(kind)
        if reset_s is not None:
            limit = {
                "Retry-After": str(reset_s),
                "RateLimit": f'"{"api" if kind == "api" else "resolvers"}";r=0;t={reset_s}',
                "RateLimit-Policy": '"fixed window";"api";q=500;w=300',
            }
            raise HubError(429, None, f"too many requests (injected fault); try again in {reset_s} s", limit)

    def _check_token(self, request: Request, target: Target | None) -> None:
        authorization = request.headers.get("authorization")
        if isinstance(target, LfsTarget):
            if authorization is not None:
                self.stats.count_authorized_lfs()
            # As on a CDN, a signed URL is enough: clients must not send the token there.
            signature = request.query_params.get("signature", "")
            if hmac.compare_digest(signature.encode(), self._sign(request.query_params, target).encode()):
                return
        required = self.faults.get().require_token or self.config.token
        if required is None:
            return
        if authorization is None:
            # huggingface_hub treats such a 401 as a missing repository; over plain HTTP only with the code.
            raise HubError(401, "RepoNotFound", "no such repository, or it needs a token: send one")
        if not hmac.compare_digest(authorization.encode(), f"Bearer {required}".encode()):
            raise HubError(401, None, "Invalid credentials in Authorization header")

    def _check_private(self, request: Request, target: Target | None) -> None:
        if not isinstance(target, InfoTarget | TreeTarget | FileTarget):
            return
        if self._is_one_of(target.model, self.faults.get().private) and not self._has_gated_token(request):
            raise HubError(401, "RepoNotFound", "no such repository, or it needs a token: send one")

    def _is_one_of(self, model: str, globs: tuple[str, ...]) -> bool:
        return any(fnmatchcase(model, glob) for glob in globs)

    def _has_gated_token(self, request: Request) -> bool:
        token = self.faults.get().gated_token
        authorization = request.headers.get("authorization", "")
        return token is not None and hmac.compare_digest(authorization.encode(), f"Bearer {token}".encode())

    def _sign(self, fields: Mapping[str, str], target: LfsTarget) -> str:
        text = f"{target.sha256}\n{fields.get('model', '')}\n{fields.get('path', '')}"
        return hmac.digest(self._secret, text.encode(), "sha256").hex()

    async def _find(self, model: str, revision: str) -> Repository:
        repository = await self._scan(self._store.repository, model)
        if repository is None:
            raise HubError(404, "RepoNotFound", f"there is no model {model}")
        if not repository.has_revision(revision):
            raise HubError(404, "RevisionNotFound", f"{model} has no revision {revision}; it has main")
        return repository

    async def _list_models(self, request: Request) -> Response:
        search = request.query_params.get("search", "").lower()
        matching = [model for model in await self._scan(self._store.models) if search in model.lower()]
        return JSONResponse([_model_summary(model) for model in matching[: self.config.page_size]])

    async def _model_info(self, request: Request, target: InfoTarget) -> Response:
        repository = await self._find(target.model, target.revision)
        with_blobs = _is_true(request.query_params.get("blobs"))
        siblings = [entry.as_sibling(with_blobs) for entry in repository.entries.values()]
        answer = JSONResponse({**_model_summary(target.model), "sha": repository.commit, "siblings": siblings})
        answer.headers["ETag"] = f'W/"{hashlib.sha1(answer.body, usedforsecurity=False).hexdigest()}"'
        if request.headers.get("if-none-match") == answer.headers["ETag"]:
            return Response(status_code=304, headers={"ETag": answer.headers["ETag"]})
        return answer

    async def _tree(self, request: Request, target: TreeTarget) -> Response:
        repository = await self._find(target.model, target.revision)
        query = request.query_params
        items = repository.list_tree(target.folder, _is_true(query.get("recursive")))
        if items is None:
            raise HubError(404, "EntryNotFound", f"{target.model} has no folder {target.folder}")
        start = _number(query.get("cursor"), 0)
        end = start + max(1, min(_number(query.get("limit"), self.config.page_size), self.config.page_size))
        headers = {"X-Repo-Commit": repository.commit}
        if end < len(items):
            next_query = {**query, "cursor": str(end)}
            address = f"{request.url.scheme}://{request.url.netloc}{_raw_path(request)}?{urlencode(next_query)}"
            headers["Link"] = f'<{address}>; rel="next"'
        return JSONResponse(items[start:end], headers=headers)

    async def _file(self, request: Request, target: FileTarget) -> Response:
        repository = await self._find(target.model, target.revision)
        if self._is_one_of(target.model, self.faults.get().gated) and not self._has_gated_token(request):
            raise HubError(403, "GatedRepo", f"access to {target.model} is restricted: ask its authors for it")
        headers = {"X-Repo-Commit": repository.commit}
        entry = repository.entries.get(target.path)
        if entry is None:
            raise HubError(404, "EntryNotFound", f"{target.model} has no file {target.path}", headers)
        if not entry.is_lfs:
            return self._content(request, repository, entry)
        fields = {"model": repository.model, "path": entry.path, "commit": repository.commit}
        fields["signature"] = self._sign(fields, LfsTarget(entry.sha256))
        headers |= {
            "Location": f"{self.config.lfs_base_url or ''}/_lfs/{entry.sha256}?{urlencode(fields)}",
            "ETag": f'"{entry.git_oid}"',
            "X-Linked-Etag": f'"{entry.sha256}"',
            "X-Linked-Size": str(entry.size_bytes),
            "Accept-Ranges": "bytes",
        }
        return Response(status_code=302, headers=headers)

    async def _lfs(self, request: Request, target: LfsTarget) -> Response:
        query = request.query_params
        file = await self._scan(self._store.find_sha256, target.sha256, query.get("model"), query.get("path"))
        if file is None:
            raise HubError(404, "EntryNotFound", f"no large file has the hash {target.sha256}")
        return self._content(request, *file)

    def _content(self, request: Request, repository: Repository, entry: TreeEntry) -> Response:
        """Return the content of a file, or its headers for HEAD; for small and large files alike."""
        faults = self.faults.get()
        name = f"{repository.model}/{entry.path}"
        headers = {
            "X-Repo-Commit": repository.commit,
            "ETag": f'"{entry.etag}"',
            "Content-Type": "application/octet-stream",
            "Content-Disposition": f"inline; filename*=UTF-8''{quote(entry.path.rsplit('/', 1)[-1])}",
        }
        if not faults.no_range:
            headers["Accept-Ranges"] = "bytes"
        if request.method == "HEAD":
            return Response(headers={**headers, "Content-Length": str(entry.size_bytes)})
        asked_range = request.headers.get("range")
        self.stats.count_get(name, asked_range)
        # If-Range: a range of changed content is useless to the client, so send the whole file.
        matching = request.headers.get("if-range", headers["ETag"]) == headers["ETag"]
        try:
            span = parse_range(asked_range, entry.size_bytes) if matching and not faults.no_range else None
        except RangeNotSatisfiableError:
            unsatisfied = {"Content-Range": f"bytes */{entry.size_bytes}"}
            raise HubError(416, None, f"{asked_range} is outside {name}", unsatisfied) from None
        first, last = span or (0, entry.size_bytes - 1)
        if span is not None:
            headers["Content-Range"] = f"bytes {first}-{last}/{entry.size_bytes}"
        plan = BodyPlan(
            entry.disk_path,
            first,
            last - first + 1,
            flip_at=self.faults.take_wrong_byte(name, first, last),
            drop_after_bytes=self.faults.take_drop(name, last - first + 1),
        )
        return FileBody(
            plan,
            200 if span is None else 206,
            headers,
            count_bytes=lambda count: self.stats.count_bytes(name, count),
            rate_bytes_per_s=self.faults.rate_bytes_per_s,
            pacer=self._pacer,
        )


def _raw_path(request: Request) -> str:
    raw: bytes = request.scope.get("raw_path") or quote(request.url.path).encode()
    return raw.decode("latin-1").split("?", 1)[0]


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")


def _is_true(value: str | None) -> bool:
    return value is not None and value.lower() in ("true", "1")


def _number(value: str | None, default: int) -> int:
    return int(value) if value is not None and value.isascii() and value.isdigit() and len(value) < 10 else default


def _model_summary(model: str) -> dict[str, Any]:
    return {
        "_id": model,
        "id": model,
        "modelId": model,
        "author": model.split("/", 1)[0],
        "private": False,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
    }
