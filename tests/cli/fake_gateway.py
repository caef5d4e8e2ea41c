"""A gateway for the commands' tests: the REST API over plain values that a test sets, on a real HTTP server."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from shoal_common.errors import ShoalError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = "org/fish"


def download(phase: str, done: int = 0, total: int = 1000, **more: Any) -> dict[str, Any]:
    """A DownloadState of node-a, as the gateway writes it."""
    base = {"node": "node-a", "model": MODEL, "phase": phase, "commit": COMMIT, "total_bytes": total}
    return {
        **base,
        "done_bytes": done,
        "sources": {},
        "speed_bytes_per_s": 0.0,
        "waiting_for": "",
        "error": None,
        **more,
    }


def instance(phase: str, identity: str = "i1", **more: Any) -> dict[str, Any]:
    """An instance on node-a."""
    stage = {"rank": 0, "node": "node-a", "first_layer": 0, "last_layer": 8, "phase": phase, "error": None}
    base = {"id": identity, "model": f"{MODEL}@{COMMIT}", "repo": "org/fish", "commit": COMMIT, "phase": phase}
    return {**base, "nodes": ["node-a"], "stages": [stage], "error": None, **more}


def lacking(phase: str, identity: str = "i1") -> dict[str, Any]:
    """An instance on node-a and node-b, whose node-b is down."""
    broken = {"code": "stage_lost", "message": "no connection to stage 1"}
    stages = [
        {"rank": 0, "node": "node-a", "first_layer": 0, "last_layer": 4, "phase": "linking", "error": broken},
        {"rank": 1, "node": "node-b", "first_layer": 4, "last_layer": 8, "phase": "down", "down_since_s": 86400.0},
    ]
    return instance(phase, identity, nodes=["node-a", "node-b"], stages=stages)


class Cluster:
    """What the gateway knows and was asked. `downloads` and `placing` are answers in turn; the last one stays."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, Any]] = []
        self.headers: dict[str, str] = {}
        self.models: list[dict[str, Any]] = []
        self.incomplete: list[str] = []
        self.downloads: list[list[dict[str, Any]]] = [[]]
        self.outcomes: dict[str, dict[str, Any]] = {}
        self.commands: dict[str, str] = {"node-a": "c1"}
        self.instances: list[dict[str, Any]] = []
        self.disks: list[dict[str, Any]] = []
        self.disk_results: dict[str, dict[str, Any]] = {}
        self.controlled: dict[str, Any] | None = None
        self.placing: list[dict[str, Any]] = [instance("ready")]
        self.answer: list[str] = ["Blub", " blub", "."]
        self.finish = True
        self.fails: ShoalError | None = None
        self.refuses_once: ShoalError | None = None
        self.fails_mid_answer: ShoalError | None = None
        self.polled = threading.Event()
        self.hold_answer = False
        self.hung_up = threading.Event()
        self.app = Starlette(
            routes=[
                Route("/v1/status", self._status),
                Route("/v1/downloads", self._downloads),
                Route("/v1/downloads", self._download, methods=["POST"]),
                Route("/v1/downloads/{verb}", self._control, methods=["POST"]),
                Route("/v1/commands/{id}", self._command),
                Route("/v1/nodes/{node}", self._forget, methods=["DELETE"]),
                Route("/events", self._no_events),
                Route("/v1/models/{org}/{name}", self._delete, methods=["DELETE"]),
                Route("/v1/storage", self._storage),
                Route("/v1/storage/{what}", self._disks, methods=["GET", "POST", "PUT"]),
                Route("/v1/instances", self._instances),
                Route("/v1/instances", self._place, methods=["POST"]),
                Route("/v1/instances/{id}", self._instance),
                Route("/v1/instances/{id}", self._unplace, methods=["DELETE"]),
                Route("/v1/instances/{id}/rebalance", self._rebalance, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ]
        )

    def asked(self, method: str, path: str) -> list[Any]:
        """The bodies (or queries) of the requests to one path."""
        return [body for m, p, body in self.requests if (m, p) == (method, path)]

    async def _note(self, request: Request) -> Response | None:
        body = json.loads(await request.body() or b"null") or dict(request.query_params)
        self.requests.append((request.method, request.url.path, body))
        self.headers = dict(request.headers)
        if self.refuses_once is not None and request.method == "POST":
            e, self.refuses_once = self.refuses_once, None
        elif self.fails is None:
            return None
        else:
            e = self.fails
        error = {"message": e.message, "type": "x", "code": e.code, "param": None, "details": e.details}
        return JSONResponse({"error": error}, e.http_status)

    async def _status(self, request: Request) -> Response:
        storage = {"node": "node-a", "quota_bytes": 10**12, "used_bytes": 5 * 10**9, "free_bytes": 3 * 10**11}
        storage |= {"foreign_count": 3, "foreign_bytes": 7, "foreign_files": ["index.db"]}
        storage["incomplete"] = self.incomplete
        services = {"gateway": {"version": "0.1.0", "pid": 7, "host": "h", "uptime_s": 65.0, "addresses": ["x:1"]}}
        services["fileserver"] = {**services["gateway"], "addresses": ["192.0.2.7:4242", "x:2"]}
        up = {"node": "node-a", "live": True, "services": services, "missing_services": [], "storage": storage}
        up["link"] = "thunderbolt"
        down = {"node": "node-b", "live": False, "services": {}, "missing_services": ["storage"], "storage": None}
        memory = {"memory_total_bytes": 64 * 10**9, "memory_available_bytes": 48 * 10**9}
        return await self._note(request) or JSONResponse(
            {
                "node": "node-a",
                "version": "0.1.0",
                "nats_connected": True,
                "nodes": [{**up, **memory}, {**down, "memory_total_bytes": 0, "memory_available_bytes": 0}],
                "models": self.models,
                "downloads": self.downloads[0],
                "instances": self.instances,
                "a field of a later version": 1,
            }
        )

    async def _downloads(self, request: Request) -> Response:
        failed = await self._note(request)
        self.polled.set()
        now = self.downloads[0]
        if len(self.downloads) > 1:
            self.downloads.pop(0)
        return failed or JSONResponse({"downloads": now})

    async def _download(self, request: Request) -> Response:
        answer = {"downloads": self.downloads[0], "commands": self.commands}
        return await self._note(request) or JSONResponse(answer, 202)

    async def _control(self, request: Request) -> Response:
        verb = request.path_params["verb"]
        done = {"cancel": {"cancelled": True}, "pause": {"models": {MODEL: "paused", "org/other": "was_paused"}}}
        row = self.controlled or done.get(verb, {"models": {MODEL: "rejected"}})
        return await self._note(request) or JSONResponse({"model": MODEL, "nodes": {"node-a": row}})

    async def _forget(self, request: Request) -> Response:
        return await self._note(request) or JSONResponse({"found": False, "key_count": 0})

    async def _no_events(self, request: Request) -> Response:
        return await self._note(request) or Response(media_type="text/event-stream")

    async def _command(self, request: Request) -> Response:
        identity = request.path_params["id"]
        failed = await self._note(request)
        if failed is not None:
            return failed
        # A command ends when its download's last state has been seen.
        if identity not in self.outcomes or len(self.downloads) > 1:
            return JSONResponse({"error": {"message": "not ended", "code": "not_found", "details": {}}}, 404)
        return JSONResponse({"id": identity, **self.outcomes[identity]})

    async def _delete(self, request: Request) -> Response:
        held = bool(self.models)
        self.models = []
        nodes = {"node-a": {"command": "c3"}} if held else {}
        return await self._note(request) or JSONResponse({"model": MODEL, "deleted": held, "nodes": nodes})

    async def _storage(self, request: Request) -> Response:
        return await self._note(request) or JSONResponse({"node": "node-a", "nodes": self.disks})

    async def _disks(self, request: Request) -> Response:
        return await self._note(request) or JSONResponse({"nodes": self.disk_results})

    async def _instances(self, request: Request) -> Response:
        return await self._note(request) or JSONResponse({"instances": self.instances})

    async def _place(self, request: Request) -> Response:
        return await self._note(request) or JSONResponse({**self.placing[0], "command": "c4"}, 201)

    async def _instance(self, request: Request) -> Response:
        if len(self.placing) > 1:
            self.placing.pop(0)
        return await self._note(request) or JSONResponse(self.placing[0])

    async def _rebalance(self, request: Request) -> Response:
        return await self._note(request) or JSONResponse({**self.placing[0], "moved": True, "command": "c5"})

    async def _unplace(self, request: Request) -> Response:
        found = any(i["id"] == request.path_params["id"] for i in self.instances)
        return await self._note(request) or JSONResponse({"id": request.path_params["id"], "deleted": found})

    async def _chat(self, request: Request) -> Response:
        failed = await self._note(request)
        return failed or StreamingResponse(self._events(request), media_type="text/event-stream")

    async def _events(self, request: Request) -> AsyncIterator[bytes]:
        def event(value: Any) -> bytes:
            return b"data: " + json.dumps(value).encode() + b"\n\n"

        try:
            yield event(
                {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}], "usage": None}
            )
            for piece in self.answer:
                yield event({"choices": [{"delta": {"content": piece}, "finish_reason": None}], "usage": None})
            if self.hold_answer:
                await asyncio.Event().wait()
            if self.fails_mid_answer is not None:
                e = self.fails_mid_answer
                yield event({"error": {"message": e.message, "code": e.code, "type": "x", "details": {}}})
                return
            if self.finish:
                yield event({"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": None})
                yield event({"choices": [], "usage": {"completion_tokens": len(self.answer)}})
                yield b"data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.hung_up.set()
            raise


def held(**more: Any) -> dict[str, Any]:
    """A model that node-a and node-b hold."""
    row = {"model": f"{MODEL}@{COMMIT}", "repo": "org/fish", "commit": COMMIT, "size_bytes": 5 * 10**9}
    return {**row, "nodes": ["node-a", "node-b"], **more}
