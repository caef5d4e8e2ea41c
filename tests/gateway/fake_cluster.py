"""Fakes of the other services, which speak the real protocol through shoal_common's code."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import msgspec

from shoal_common.bus import subjects
from shoal_common.bus.events import EventEmitter
from shoal_common.bus.keys import download_key, instance_key, model_key, stage_key
from shoal_common.errors import ShoalError
from shoal_common.liveness.liveness import Liveness
from shoal_common.messages import encode
from shoal_common.messages.downloads import DownloadState
from shoal_common.messages.envelope import Empty
from shoal_common.messages.generation import Accepted, CancelGenerate, Generate, TokenEvent
from shoal_common.messages.instances import (
    InstancePhase,
    InstanceSpec,
    InstanceState,
    StagePhase,
    StageSpec,
    StageState,
)
from shoal_common.messages.liveness import NodeFacts
from shoal_common.messages.storage import ModelState
from shoal_common.rpc.command_worker import CommandHandler, CommandWorker
from shoal_common.rpc.request_reply import RpcEndpoint, serve
from tests.gateway.running_gateway import RunningGateway
from tests.harness.nats import Joined, joined
from tests.harness.waiting import eventually

COMMIT = "c" * 40
HTTP_DEADLINE_S = 45.0


class Prompt:
    """A generate request that has arrived; sends its tokens."""

    def __init__(self, cluster: Cluster, question: Generate) -> None:
        self._cluster, self.question = cluster, question

    async def event(self, event: TokenEvent) -> None:
        """Publish one event unchanged."""
        client = self._cluster.joined.client
        await client.publish(subjects.tokens(self.question.request), encode(event))
        await client.flush()

    async def publish_tokens(self, *texts: str, first: int = 0, finish: bool = False) -> None:
        """Publish tokens, numbered from `first`; the last one ends the answer with `finish`."""
        for i, text in enumerate(texts):
            last = finish and i == len(texts) - 1
            await self.event(
                TokenEvent(
                    request=self.question.request,
                    index=first + i,
                    token=first + i,
                    text=text,
                    finish_reason="stop" if last else None,
                )
            )


class Inference:
    """A fake inference service. Prompts and cancellations wait in queues for the test."""

    def __init__(self) -> None:
        self.prompts: asyncio.Queue[Prompt] = asyncio.Queue()
        self.cancelled: asyncio.Queue[str] = asyncio.Queue()
        self.refusal: ShoalError | None = None

    async def prompt(self) -> Prompt:
        """Return the next prompt."""
        return await asyncio.wait_for(self.prompts.get(), HTTP_DEADLINE_S)

    async def cancellation(self) -> str:
        """Return the next cancelled request."""
        return await asyncio.wait_for(self.cancelled.get(), HTTP_DEADLINE_S)


class Cluster:
    """The fake cluster around the gateway, and an HTTP client."""

    def __init__(self, gateway: RunningGateway, joined: Joined, tasks: asyncio.TaskGroup) -> None:
        self.gateway, self.joined, self.tasks = gateway, joined, tasks
        self.stopping = asyncio.Event()
        self.http = httpx2.AsyncClient(
            base_url=gateway.url, timeout=HTTP_DEADLINE_S, trust_env=False, headers=gateway.key
        )
        self._background: list[asyncio.Task[None]] = []
        self._liveness: list[Liveness] = []
        self._written: list[tuple[str, str]] = []

    async def live(self, node: str, service: str, facts: NodeFacts | None = None) -> None:
        """Publish a service of a node as live until the cluster closes."""
        liveness = Liveness(self.joined.buckets.live, node, service)
        liveness.set_facts(facts or NodeFacts())
        await liveness.claim()
        self._liveness.append(liveness)
        self._background.append(self.tasks.create_task(liveness.renew_forever()))
        await self.seen(
            "/v1/status", lambda s: any(service in n["services"] for n in s["nodes"] if n["node"] == node)
        )

    async def write(self, bucket: str, key: str, value: object) -> None:
        """Publish a key; it is deleted when the cluster closes."""
        await getattr(self.joined.buckets, bucket).put(key, value)
        self._written.append((bucket, key))

    async def seen(self, path: str, wanted: Callable[[Any], bool]) -> Any:
        """Poll `path` and return the response once it satisfies the condition."""

        async def ask() -> Any:
            answer = (await self.http.get(path)).json()
            return answer if wanted(answer) else None

        return await eventually(ask, f"{path} as wanted")

    async def held(self, node: str, repo: str, size_bytes: int = 1000) -> None:
        """Publish a model that a node holds."""
        state = ModelState(
            node=node, repo=repo, commit=COMMIT, size_bytes=size_bytes, file_count=3, ready_at_s=1_700_000_000.5
        )
        await self.write("state", model_key(node, state.model), state)
        await self.seen("/v1/status", lambda s: any(m["repo"] == repo and node in m["nodes"] for m in s["models"]))

    async def downloading(self, state: DownloadState) -> None:
        """Publish a download."""
        await self.write("state", download_key(state.node, state.model), state)

    async def stage(self, instance: str, rank: int, node: str, phase: StagePhase = "ready") -> None:
        """Publish a stage."""
        state = StageState(instance=instance, rank=rank, node=node, epoch=1, phase=phase, weight_bytes=64 << 20)
        await self.write("state", stage_key(instance, rank), state)

    async def placed(self, instance: str, repo: str, nodes: list[str], phase: InstancePhase = "ready") -> None:
        """Publish an instance with four layers on each node, all stages ready."""
        stages = [StageSpec(rank=i, node=n, first_layer=4 * i, last_layer=4 * i + 4) for i, n in enumerate(nodes)]
        spec = InstanceSpec(id=instance, repo=repo, commit=COMMIT, stages=stages, context_tokens=4096)
        await self.write("spec", instance_key(instance), spec)
        for stage in stages:
            await self.stage(instance, stage.rank, stage.node)
        state = InstanceState(id=instance, repo=repo, commit=COMMIT, phase=phase, nodes=nodes)
        await self.write("state", instance_key(instance), state)
        await self.seen(
            "/v1/status",
            lambda s: any(
                i["id"] == instance and i["phase"] == phase and all(t["phase"] == "ready" for t in i["stages"])
                for i in s["instances"]
            ),
        )

    async def inference(self, node: str) -> Inference:
        """Run a live fake inference service."""
        peer = Inference()

        async def generate(question: Generate) -> Accepted:
            if peer.refusal is not None:
                raise peer.refusal
            peer.prompts.put_nowait(Prompt(self, question))
            return Accepted(request=question.request, prompt_tokens=7)

        async def cancel(question: CancelGenerate) -> Empty:
            peer.cancelled.put_nowait(question.request)
            return Empty()

        questions = {"generate": RpcEndpoint(Generate, generate), "cancel": RpcEndpoint(CancelGenerate, cancel)}
        self.tasks.create_task(serve(self.joined.nats, "inference", node, questions, self.stopping))
        await self.live(node, "inference", NodeFacts(memory_total_bytes=16 << 30, memory_available_bytes=9 << 30))
        return peer

    async def worker(
        self, service: str, node: str, verb: str, kind: type[Any], handle: Callable[[Any], Awaitable[object]]
    ) -> None:
        """Run a live service that handles one command. Node `any` is the leader."""

        async def handled(command: Any, _identity: str) -> object:
            return await handle(command)

        nats = self.joined.nats
        verbs: Mapping[str, CommandHandler] = {verb: CommandHandler(kind, handled, 60.0)}
        worker = CommandWorker(nats, self.joined.buckets, EventEmitter(nats, service, "peer"), service, "peer", verbs)
        self.tasks.create_task(worker.run(node, self.stopping))
        await self.live("leader" if node == subjects.ANY else node, service)

    async def close(self) -> None:
        """Delete everything published."""
        self.stopping.set()
        await self.http.aclose()
        for task in self._background:
            task.cancel()
        for liveness in self._liveness:
            await liveness.remove_key()
        for bucket, key in self._written:
            await getattr(self.joined.buckets, bucket).delete(key)


@asynccontextmanager
async def cluster(gateway: RunningGateway) -> AsyncIterator[Cluster]:
    """Run an empty cluster around the gateway."""
    async with joined(gateway.nats) as connection, asyncio.TaskGroup() as tasks:
        playing = Cluster(gateway, connection, tasks)
        try:
            yield playing
        finally:
            await playing.close()


@asynccontextmanager
async def running(gateway: RunningGateway, repo: str = "org/tiny") -> AsyncIterator[tuple[Cluster, Inference]]:
    """Run a cluster with one ready model: instance `i1` with its only stage on node `a`."""
    async with cluster(gateway) as playing:
        peer = await playing.inference("a")
        await playing.placed("i1", repo, ["a"])
        yield playing, peer


def chat_request(model: str = "org/tiny", **more: Any) -> dict[str, Any]:
    """Return the body of a chat request."""
    return {"model": model, "messages": [{"role": "user", "content": "Hello"}], **more}


def error_of(response: httpx2.Response, status: int) -> dict[str, Any]:
    """Return the error of a response, after checking that it has all of OpenAI's fields."""
    assert response.status_code == status, (response.status_code, response.text)
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "code", "param", "details"}, error
    assert isinstance(error["message"], str) and isinstance(error["code"], str) and isinstance(error["type"], str)
    if status in (429, 503):
        assert int(response.headers["retry-after"]) >= 1
    return error


def events_of(text: str) -> list[Any]:
    """Return the JSON of each server-sent event, and `[DONE]` as it is."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else msgspec.json.decode(line) for line in lines]


def text_of(events: list[Any]) -> str:
    """Return all text of a stream."""
    return "".join(c["delta"].get("content", "") for e in events if "choices" in e for c in e["choices"])


def now_s() -> float:
    """Return the Unix time."""
    return time.time()
