"""Chat completions over real HTTP and real NATS, answered by a fake inference service."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from shoal_common.errors import ErrorBody
from shoal_common.messages.generation import TokenEvent
from tests.gateway.fake_cluster import chat_request, cluster, events_of, running, text_of
from tests.gateway.running_gateway import RunningGateway


async def test_a_full_answer_has_text_usage_and_the_incarnation(gateway: RunningGateway) -> None:
    async with running(gateway) as (c, peer):
        asking = asyncio.create_task(c.http.post("/v1/chat/completions", json=chat_request(max_tokens=9, seed=3)))
        prompt = await peer.prompt()
        await prompt.publish_tokens("Hel", "lo", "!", finish=True)
        body = (await asking).json()
    assert body["object"] == "chat.completion" and body["model"] == "org/tiny"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello!", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    assert body["system_fingerprint"] == "i1-1"
    assert (prompt.question.max_tokens, prompt.question.seed, prompt.question.temperature) == (9, 3, 1.0)
    assert [(m.role, m.content) for m in prompt.question.messages] == [("user", "Hello")]
    assert peer.cancelled.empty()


async def test_stream_begins_with_the_role_and_ends_with_done(gateway: RunningGateway) -> None:
    async with running(gateway) as (c, peer):
        body = chat_request(stream=True, stream_options={"include_usage": True})
        asking = asyncio.create_task(c.http.post("/v1/chat/completions", json=body))
        await (await peer.prompt()).publish_tokens("Hel", "lo", finish=True)
        response = await asking
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response.text)
    assert events.pop() == "[DONE]"
    usage = events.pop()
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 2
    assert all(e["usage"] is None and e["object"] == "chat.completion.chunk" for e in events)
    assert len({e["id"] for e in events}) == 1
    assert [e["choices"][0]["delta"] for e in events] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        {},
    ]
    assert [e["choices"][0]["finish_reason"] for e in events] == [None, None, None, "stop"]


async def test_tokens_are_passed_on_while_they_are_made(gateway: RunningGateway) -> None:
    async with running(gateway) as (c, peer):
        shown: asyncio.Queue[str] = asyncio.Queue()

        async def read() -> None:
            async with c.http.stream("POST", "/v1/chat/completions", json=chat_request(stream=True)) as response:
                async for line in response.aiter_lines():
                    await shown.put(line)

        async def until(text: str) -> None:
            while text not in await asyncio.wait_for(shown.get(), 5):
                pass

        reading = asyncio.create_task(read())
        prompt = await peer.prompt()
        await prompt.publish_tokens("one")
        await until('"one"')
        await prompt.publish_tokens("two", first=1, finish=True)
        await until('"two"')
        await until("[DONE]")
        await reading


async def test_tokens_out_of_order_and_twice_are_shown_in_order_once(gateway: RunningGateway) -> None:
    async with running(gateway) as (c, peer):
        asking = asyncio.create_task(c.http.post("/v1/chat/completions", json=chat_request(stream=True)))
        prompt = await peer.prompt()
        for i in (1, 0, 0, 3, 1, 2):
            await prompt.publish_tokens("abcd"[i], first=i, finish=i == 3)
        events = events_of((await asking).text)
    assert text_of(events) == "abcd" and events[-1] == "[DONE]"


async def test_stop_string_across_tokens_ends_the_text_before_it(gateway: RunningGateway) -> None:
    async with running(gateway) as (c, peer):
        body = chat_request(stream=True, stop=["END"], stream_options={"include_usage": True})
        asking = asyncio.create_task(c.http.post("/v1/chat/completions", json=body))
        prompt = await peer.prompt()
        await prompt.publish_tokens("One E", "N", "ough, two E", "N", "D and more")
        events = events_of((await asking).text)
        assert await peer.cancellation() == prompt.question.request
    assert text_of(events) == "One ENough, two "
    assert events[-3]["choices"][0]["finish_reason"] == "stop" and events[-1] == "[DONE]"


async def test_text_held_for_a_stop_string_that_never_comes_is_shown(gateway: RunningGateway) -> None:
    async with running(gateway) as (c, peer):
        asking = asyncio.create_task(c.http.post("/v1/chat/completions", json=chat_request(stop="END")))
        await (await peer.prompt()).publish_tokens("the E", "N", finish=True)
        body = (await asking).json()
    assert body["choices"][0]["message"]["content"] == "the EN"


@pytest.mark.parametrize(
    ("end", "outcome"),
    [
        ({"finish_reason": "length"}, "length"),
        ({"error": ErrorBody(code="stage_lost", message="gone")}, "stage_lost"),
    ],
)
async def test_each_answer_logs_one_line_with_its_figures_and_no_text(
    gateway: RunningGateway, end: dict[str, Any], outcome: str
) -> None:
    async with running(gateway) as (c, peer):
        asking = asyncio.create_task(c.http.post("/v1/chat/completions", json=chat_request()))
        prompt = await peer.prompt()
        request = prompt.question.request
        await prompt.publish_tokens("SECRET", "SECRET")
        await prompt.event(TokenEvent(request=request, index=2, **end))
        await asking
    lines = [line for line in gateway.log.read_text().splitlines() if request in line]
    assert len(lines) == 1
    tokens = 3 if outcome == "length" else 2
    assert re.fullmatch(
        rf'ts=\S+ level=info service=gateway node=here msg="answer ended" request={request} '
        rf"model=org/tiny instance=i1 prompt_tokens=7 tokens={tokens} "
        rf"first_token_s=[0-9.]+ total_s=[0-9.]+ outcome={outcome}",
        lines[0],
    )
    assert "SECRET" not in gateway.log.read_text() and "Hello" not in gateway.log.read_text()


async def test_finish_reason_length_is_returned(gateway: RunningGateway) -> None:
    async with running(gateway) as (c, peer):
        asking = asyncio.create_task(c.http.post("/v1/chat/completions", json=chat_request(max_completion_tokens=1)))
        prompt = await peer.prompt()
        await prompt.event(
            TokenEvent(request=prompt.question.request, index=0, token=5, text="x", finish_reason="length")
        )
        body = (await asking).json()
    assert prompt.question.max_tokens == 1
    assert body["choices"][0]["finish_reason"] == "length"


async def test_client_that_disconnects_cancels_the_answer(gateway: RunningGateway) -> None:
    async with running(gateway) as (c, peer):

        async def read_one_token() -> None:
            async with c.http.stream("POST", "/v1/chat/completions", json=chat_request(stream=True)) as response:
                async for line in response.aiter_lines():
                    if '"one"' in line:
                        return

        reading = asyncio.create_task(read_one_token())
        prompt = await peer.prompt()
        await prompt.publish_tokens("one")
        await reading
        assert await peer.cancellation() == prompt.question.request


async def test_client_that_disconnects_before_the_first_token_cancels(gateway: RunningGateway) -> None:
    for stream in (True, False):
        async with running(gateway) as (c, peer):
            asking = asyncio.create_task(c.http.post("/v1/chat/completions", json=chat_request(stream=stream)))
            prompt = await peer.prompt()
            asking.cancel()
            assert await peer.cancellation() == prompt.question.request


async def test_requests_go_to_the_ready_instance_with_fewest_in_flight(gateway: RunningGateway) -> None:
    async with cluster(gateway) as c:
        peers = {"i1": await c.inference("a"), "i2": await c.inference("b")}
        await c.placed("i1", "org/tiny", ["a"])
        await c.placed("i2", "org/tiny", ["b"])
        first = asyncio.create_task(c.http.post("/v1/chat/completions", json=chat_request()))
        one = await peers["i1"].prompt()
        second = asyncio.create_task(c.http.post("/v1/chat/completions", json=chat_request()))
        two = await peers["i2"].prompt()
        named = asyncio.create_task(c.http.post("/v1/chat/completions", json=chat_request("i2")))
        three = await peers["i2"].prompt()
        for prompt in (one, two, three):
            await prompt.publish_tokens("x", finish=True)
        answers = [(await task).json() for task in (first, second, named)]
    assert [a["system_fingerprint"] for a in answers] == ["i1-1", "i2-1", "i2-1"]
