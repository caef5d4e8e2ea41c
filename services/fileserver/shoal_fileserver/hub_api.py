"""The hub's protocol, read-only: an unmodified huggingface_hub downloads models from the cluster.

    GET       /api/models/<org>/<name>[/revision/<revision>]            the model, its commit and files
    GET       /api/models/<org>/<name>/tree/<revision>[/<folder>]       sizes and hashes of files
    GET HEAD  /<org>/<name>/resolve/<revision>/<path>                   a file

A file of another node is answered with a redirect to it. Like the hub's, it carries `X-Linked-Etag` and
`X-Linked-Size`, so that clients follow without asking again, and a URL that allows reading this one file for a while,
under the secret that the two nodes share: clients send no credential across hosts.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import quote, urlencode

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from shoal_common.bus import cluster_clock
from shoal_common.errors import BadName, Denied, NotFound, ShoalError
from shoal_common.identity.peer_tokens import PeerTokens
from shoal_common.messages.manifest import Manifest, ManifestFile
from shoal_common.names import DEFAULT_REVISION, ModelRef
from shoal_fileserver.model_index import ModelIndex, ModelLocation

REDIRECT_LIFETIME_S = 3600
"""How long a redirect's URL allows reading its file."""
_MAX_REVISION_PARTS = 8
_GIT_DIGITS = 40
_POINTER_BYTES = 134
"""Typical size of the LFS pointer that git holds for a large file."""

ServeBlob = Callable[[Request, str, Mapping[str, str]], Awaitable[Response]]
"""Responds to a request with a blob of this node, adding these headers."""
HubHandler = Callable[[Request], Awaitable[Response]]


class HubApi:
    """Answers like the hub, from what the cluster holds."""

    def __init__(
        self, hub_key: str, loopback_only: bool, tokens: PeerTokens, model_index: ModelIndex, serve_blob: ServeBlob
    ) -> None:
        self._hub_key, self._loopback_only, self._tokens = hub_key, loopback_only, tokens
        self._model_index, self._serve_blob = model_index, serve_blob

    @property
    def routes(self) -> list[BaseRoute]:
        """Routes of the protocol."""
        return [
            Route("/api/models/{org}/{name}", _refusing(self._info), methods=["GET"]),
            Route("/api/models/{org}/{name}/revision/{rest:path}", _refusing(self._info), methods=["GET"]),
            Route("/api/models/{org}/{name}/tree/{rest:path}", _refusing(self._tree), methods=["GET"]),
            Route("/{org}/{name}/resolve/{rest:path}", _refusing(self._file), methods=["GET", "HEAD"]),
        ]

    async def _info(self, request: Request) -> Response:
        self._require_credential(request)
        location, rest = await self._find(request)
        if rest:
            raise NotFound(f"{location.manifest.repo} has no such revision", hub_code="RevisionNotFound")
        return JSONResponse(_summary(location.manifest, with_blobs=_is_true(request.query_params.get("blobs"))))

    async def _tree(self, request: Request) -> Response:
        self._require_credential(request)
        location, folder = await self._find(request)
        return _listing(location.manifest, folder, recursive=_is_true(request.query_params.get("recursive")))

    async def _file(self, request: Request) -> Response:
        query = request.query_params
        if "key" not in query:
            self._require_credential(request)
        location, path = await self._find(request)
        manifest = location.manifest
        commit = {"X-Repo-Commit": manifest.commit}
        file = next((f for f in manifest.files if f.path == path), None)
        if "key" in query and not (file and self._tokens.query_allows(file.sha256, query, cluster_clock.now_s())):
            self._require_credential(request)
        if file is None:
            return _refusal(404, "EntryNotFound", f"{manifest.repo} has no file {path[:200]}", commit)
        if location.link is None:
            return await self._serve_blob(request, file.sha256, commit | {"ETag": f'"{_etag(file)}"'})
        until_s = int(cluster_clock.now_s()) + REDIRECT_LIFETIME_S
        query_string = urlencode(self._tokens.signed_query(location.node, file.sha256, until_s))
        origin = f"http{'s' if location.link.tls else ''}://{location.link.address}"
        address = f"{origin}/{manifest.repo}/resolve/{manifest.commit}/{quote(file.path)}"
        redirect = {
            "Location": f"{address}?{query_string}" if query_string else address,
            "X-Linked-Etag": f'"{_etag(file)}"',
            "X-Linked-Size": str(file.size_bytes),
        }
        return Response(status_code=302, headers=commit | redirect)

    def _require_credential(self, request: Request) -> None:
        if not is_authorized(self._hub_key, self._loopback_only, request.headers.get("authorization", "")):
            raise Denied("set HF_TOKEN to this node's key for its hub protocol: `shoal hub` prints it")

    async def _find(self, request: Request) -> tuple[ModelLocation, str]:
        """Return the model of `<revision>/<rest>`, and the rest. Raises NotFound, BadName.

        Revisions may contain slashes: the shortest one that a node holds is meant.
        """
        fields, server_address = request.path_params, (request.scope.get("server") or ("",))[0]
        repo, parts = f"{fields['org']}/{fields['name']}", fields.get("rest", DEFAULT_REVISION).split("/")
        for end in range(1, min(len(parts), _MAX_REVISION_PARTS) + 1):
            ref = ModelRef.parse(f"{repo}@{'/'.join(parts[:end])}")
            if location := await self._model_index.find(ref, server_address):
                return location, "/".join(parts[end:])
        code = "RevisionNotFound" if self._model_index.holds(repo) else "RepoNotFound"
        message = f"no live node of this cluster holds {repo} at {parts[0]}: download it with `shoal pull {repo}`"
        raise NotFound(message, hub_code=code)


def is_authorized(hub_key: str, loopback_only: bool, authorization: str) -> bool:
    """Return whether a request may use the hub's protocol. Without a key, whoever reaches loopback may."""
    if not hub_key:
        return loopback_only
    return hmac.compare_digest(authorization.encode(errors="replace"), f"Bearer {hub_key}".encode())


def _refusing(answer: HubHandler) -> HubHandler:
    """Return a handler whose errors are what huggingface_hub expects."""

    async def refusing(request: Request) -> Response:
        try:
            return await answer(request)
        except BadName as e:
            return _refusal(404, "RepoNotFound", e.message)
        except ShoalError as e:
            return _refusal(e.http_status, str(e.details.get("hub_code", "")), e.message)

    return refusing


def _etag(file: ManifestFile) -> str:
    """Return the hub's name for a file's bytes: git's sha1 for small files, the sha256 for others."""
    return file.git_sha1 or file.sha256


def _summary(manifest: Manifest, with_blobs: bool) -> dict[str, Any]:
    summary = dict.fromkeys(("_id", "id", "modelId"), manifest.repo) | {"author": manifest.repo.partition("/")[0]}
    siblings = [{"rfilename": f.path, **(_named(f) if with_blobs else {})} for f in manifest.files]
    flags = dict.fromkeys(("private", "gated", "disabled"), False) | dict.fromkeys(("downloads", "likes"), 0)
    return {**summary, **flags, "sha": manifest.commit, "tags": [], "siblings": siblings}


def _named(file: ManifestFile) -> dict[str, Any]:
    if file.git_sha1:
        return {"size": file.size_bytes, "blobId": file.git_sha1}
    lfs = {"sha256": file.sha256, "size": file.size_bytes, "pointerSize": _POINTER_BYTES}
    return {"size": file.size_bytes, "blobId": file.sha256[:_GIT_DIGITS], "lfs": lfs}


def _listing(manifest: Manifest, folder: str, recursive: bool) -> Response:
    """List the files below a folder, and its folders unless the listing is recursive."""
    prefix = f"{folder}/" if folder else ""
    files = {f.path[len(prefix) :]: f for f in manifest.files if f.path.startswith(prefix)}
    if not files:
        raise NotFound(f"{manifest.repo} has no folder {folder[:200]}", hub_code="EntryNotFound")
    folders = [] if recursive else sorted({path.split("/")[0] for path in files if "/" in path})
    entries = [{"type": "directory", "oid": manifest.commit, "size": 0, "path": prefix + name} for name in folders]
    entries += [_entry(f) for path, f in files.items() if recursive or "/" not in path]
    return JSONResponse(entries, headers={"X-Repo-Commit": manifest.commit})


def _entry(file: ManifestFile) -> dict[str, Any]:
    entry = {"type": "file", "size": file.size_bytes, "path": file.path}
    if file.git_sha1:
        return {**entry, "oid": file.git_sha1}
    lfs = {"oid": file.sha256, "size": file.size_bytes, "pointerSize": _POINTER_BYTES}
    # git's id of the LFS pointer is not known; clients do not look anything up by it.
    return {**entry, "oid": file.sha256[:_GIT_DIGITS], "lfs": lfs}


def _is_true(value: str | None) -> bool:
    return value is not None and value.lower() in ("true", "1")


def _refusal(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> Response:
    # A header holds printable ASCII only, and the message may quote a name from the request.
    printable = "".join(c if " " <= c <= "~" else "?" for c in message)
    all_headers = {"X-Error-Message": printable, **({"X-Error-Code": code} if code else {}), **(headers or {})}
    return JSONResponse({"error": message}, status, all_headers)
