"""The other services, as the gateway meets them: they speak the real protocol through shoal_common's real code."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import msgspec

from shoal_common import subjects
from shoal_common.buckets import download_key, instance_key, model_key, stage_key
from shoal_common.commands import CommandWorker, Verb
from shoal_common.errors import ShoalError
from shoal_common.events import Events
from shoal_common.liveness import Liveness
from shoal_common.messages import encode
from shoal_common.messages.facts import Facts
from shoal_common.messages.questions import Accepted, CancelGenerate, Done, Generate, TokenEvent
from shoal_common.messages.records import (
    DownloadState,
    InstancePhase,
    InstanceSpec,
    InstanceState,
    ModelState,
    StagePhase,
    StageSpec,
    StageState,
)
from shoal_common.questions import Question, serve
from tests.gateway.process import RunningGateway
from tests.harness.nats import Joined, joined
from tests.harness.waiting import eventually

COMMIT = "c" * 40
HTTP_DEADLINE_S = 45.0


class Prompt:
    """A generate question that has arrived, and the tokens that its asker is sent."""

    def __init__(self, cluster: Cluster, question: Generate) -> None:
        self._cluster, self.question = cluster, question

    async def event(self, event: TokenEvent) -> None:
        """Publish one event as it is."""
        client = self._cluster.joined.client
        await client.publish(subjects.tokens(self.question.request), encode(event))
        await client.flush()

    async def say(self, *texts: str, first: int = 0, finish: bool = False) -> None:
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
    """An inference service. Prompts and cancellations wait in queues for the test to look at."""

    def __init__(self) -> None:
        self.prompts: asyncio.Queue[Prompt] = asyncio.Queue()
        self.cancelled: asyncio.Queue[str] = asyncio.Queue()
        self.refusal: ShoalError | None = None

    async def prompt(self) -> Prompt:
        """The next prompt."""
        return await asyncio.wait_for(self.prompts.get(), HTTP_DEADLINE_S)

    async def cancellation(self) -> str:
        """The request that is cancelled next."""
        return await asyncio.wait_for(self.cancelled.get(), HTTP_DEADLINE_S)


class Cluster:
    """What the test's process plays, and its HTTP client of the gateway."""

    def __init__(self, gateway: RunningGateway, joined: Joined, tasks: asyncio.TaskGroup) -> None:
        self.gateway, self.joined, self.tasks = gateway, joined, tasks
        self.stopping = asyncio.Event()
        self.http = httpx2.AsyncClient(base_url=gateway.url, timeout=HTTP_DEADLINE_S, trust_env=False)
        self._background: list[asyncio.Task[None]] = []
        self._liveness: list[Liveness] = []
        self._written: list[tuple[str, str]] = []

    async def live(self, node: str, service: str, facts: Facts | None = None) -> None:
        """Make a service of a node live, until the cluster closes."""
        liveness = Liveness(self.joined.buckets.live, node, service)
        liveness.set_facts(facts or Facts())
        await liveness.claim()
        self._liveness.append(liveness)
        self._background.append(self.tasks.create_task(liveness.beat_forever()))
        await self.seen(
            "/v1/status", lambda s: any(service in n["services"] for n in s["nodes"] if n["node"] == node)
        )

    async def write(self, bucket: str, key: str, value: object) -> None:
        """Write a key as its owner would; it goes when the cluster closes."""
        await getattr(self.joined.buckets, bucket).put(key, value)
        self._written.append((bucket, key))

    async def seen(self, path: str, wanted: Callable[[Any], bool]) -> Any:
        """The gateway's answer at `path`, once it is as wanted."""

        async def ask() -> Any:
            answer = (await self.http.get(path)).json()
            return answer if wanted(answer) else None

        return await eventually(ask, f"{path} as wanted")

    async def held(self, node: str, repo: str, size_bytes: int = 1000) -> None:
        """A model that a node holds."""
        state = ModelState(
            node=node, repo=repo, commit=COMMIT, size_bytes=size_bytes, file_count=3, ready_at_s=1_700_000_000.5
        )
        await self.write("state", model_key(node, state.model), state)
        await self.seen("/v1/status", lambda s: any(m["repo"] == repo and node in m["nodes"] for m in s["models"]))

    async def downloading(self, state: DownloadState) -> None:
        """A download as its fetcher reports it."""
        await self.write("state", download_key(state.node, state.model), state)

    async def stage(self, instance: str, rank: int, node: str, phase: StagePhase = "ready") -> None:
        """A stage as its node reports it."""
        state = StageState(instance=instance, rank=rank, node=node, epoch=1, phase=phase, weight_bytes=64 << 20)
        await self.write("state", stage_key(instance, rank), state)

    async def placed(self, instance: str, repo: str, nodes: list[str], phase: InstancePhase = "ready") -> None:
        """An instance with four layers on each node, all stages ready."""
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
        """A live inference service that answers questions."""
        peer = Inference()

        async def generate(question: Generate) -> Accepted:
            if peer.refusal is not None:
                raise peer.refusal
            peer.prompts.put_nowait(Prompt(self, question))
            return Accepted(request=question.request, prompt_tokens=7)

        async def cancel(question: CancelGenerate) -> Done:
            peer.cancelled.put_nowait(question.request)
            return Done()

        questions = {"generate": Question(Generate, generate), "cancel": Question(CancelGenerate, cancel)}
        self.tasks.create_task(serve(self.joined.nats, "inference", node, questions, self.stopping))
        await self.live(node, "inference", Facts(memory_total_bytes=16 << 30, memory_available_bytes=9 << 30))
        return peer

    async def worker(
        self, service: str, node: str, verb: str, kind: type[Any], handle: Callable[[Any], Awaitable[object]]
    ) -> None:
        """A live service that carries out one command. Node `any` leads."""

        async def handled(command: Any, _identity: str) -> object:
            return await handle(command)

        nats = self.joined.nats
        verbs: Mapping[str, Verb] = {verb: Verb(kind, handled, 60.0)}
        worker = CommandWorker(nats, self.joined.buckets, Events(nats, service, "peer"), service, "peer", verbs)
        self.tasks.create_task(worker.run(node, self.stopping))
        await self.live("leader" if node == subjects.ANY else node, service)

    async def close(self) -> None:
        """Leave nothing behind for the next test."""
        self.stopping.set()
        await self.http.aclose()
        for task in self._background:
            task.cancel()
        for liveness in self._liveness:
            await liveness.withdraw()
        for bucket, key in self._written:
            await getattr(self.joined.buckets, bucket).delete(key)


@asynccontextmanager
async def cluster(gateway: RunningGateway) -> AsyncIterator[Cluster]:
    """A cluster around the gateway, empty at first."""
    async with joined(gateway.nats) as connection, asyncio.TaskGroup() as tasks:
        playing = Cluster(gateway, connection, tasks)
        try:
            yield playing
        finally:
            await playing.close()


@asynccontextmanager
async def running(gateway: RunningGateway, repo: str = "org/tiny") -> AsyncIterator[tuple[Cluster, Inference]]:
    """A cluster in which one model answers: instance `i1` with its only stage on node `a`."""
    async with cluster(gateway) as playing:
        peer = await playing.inference("a")
        await playing.placed("i1", repo, ["a"])
        yield playing, peer


def question(model: str = "org/tiny", **more: Any) -> dict[str, Any]:
    """The body of a chat request."""
    return {"model": model, "messages": [{"role": "user", "content": "Hello"}], **more}


def error_of(response: httpx2.Response, status: int) -> dict[str, Any]:
    """The error in an answer, after checking that all of OpenAI's fields are there."""
    assert response.status_code == status, (response.status_code, response.text)
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "code", "param", "details"}, error
    assert isinstance(error["message"], str) and isinstance(error["code"], str) and isinstance(error["type"], str)
    if status in (429, 503):
        assert int(response.headers["retry-after"]) >= 1
    return error


def events_of(text: str) -> list[Any]:
    """The JSON of each server-sent event; `[DONE]` as itself."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else msgspec.json.decode(line) for line in lines]


def text_of(events: list[Any]) -> str:
    """All text of a stream."""
    return "".join(c["delta"].get("content", "") for e in events if "choices" in e for c in e["choices"])


def now_s() -> float:
    """Seconds since 1970."""
    return time.time()
