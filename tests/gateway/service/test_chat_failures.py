"""Errors of chat completions: an HTTP status before the first token, an event in the stream after it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from shoal_common.errors import Busy, PromptTooLong
from shoal_common.messages.generation import TokenEvent
from tests.gateway.fake_cluster import chat_request, cluster, error_of, events_of, running, text_of
from tests.gateway.running_gateway import RunningGateway


async def test_unknown_model_is_404_with_how_to_run_it(gateway: RunningGateway) -> None:
    async with running(gateway) as (c, _):
        error = error_of(await c.http.post("/v1/chat/completions", json=chat_request("org/other")), 404)
        assert "shoal run org/other" in error["message"] and error["param"] == "model"
        assert error["details"]["running"] == ["org/tiny"]
        error_of(await c.http.post("/v1/chat/completions", json=chat_request("gpt-4")), 404)
        error_of(await c.http.post("/v1/chat/completions", json=chat_request("../../etc/passwd")), 404)


async def test_model_placed_but_not_ready_is_503_with_the_phase(gateway: RunningGateway) -> None:
    async with cluster(gateway) as c:
        await c.inference("a")
        await c.placed("i1", "org/tiny", ["a"], phase="starting")
        error = error_of(await c.http.post("/v1/chat/completions", json=chat_request()), 503)
    assert "i1" in error["message"] and "starting" in error["message"]


async def test_instance_on_a_down_node_is_503_and_names_it(gateway: RunningGateway) -> None:
    async with cluster(gateway) as c:
        await c.placed("i1", "org/tiny", ["gone"])
        error = error_of(await c.http.post("/v1/chat/completions", json=chat_request()), 503)
    assert error["code"] == "stage_lost" and "gone" in error["message"]


async def test_refusal_of_the_instance_keeps_its_status_and_message(gateway: RunningGateway) -> None:
    async with running(gateway) as (c, peer):
        for stream in (False, True):
            peer.refusal = PromptTooLong("9000 tokens do not fit 4096", prompt_tokens=9000, context_tokens=4096)
            error = error_of(await c.http.post("/v1/chat/completions", json=chat_request(stream=stream)), 400)
            assert error["code"] == "prompt_too_long" and error["details"]["prompt_tokens"] == 9000
            peer.refusal = Busy("8 requests are in flight; try again", retry_after_s=3)
            response = await c.http.post("/v1/chat/completions", json=chat_request(stream=stream))
            assert error_of(response, 429)["code"] == "busy" and response.headers["retry-after"] == "3"
        assert peer.cancelled.empty()


async def test_error_before_the_first_token_is_an_http_status(gateway: RunningGateway) -> None:
    async with running(gateway) as (c, peer):
        for stream in (False, True):
            asking = asyncio.create_task(c.http.post("/v1/chat/completions", json=chat_request(stream=stream)))
            prompt = await peer.prompt()
            await prompt.event(TokenEvent(request=prompt.question.request, error=Busy("the cache is full").body()))
            assert error_of(await asking, 429)["message"] == "the cache is full"


async def test_error_after_the_first_token_is_the_streams_last_event(gateway: RunningGateway) -> None:
    async with running(gateway) as (c, peer):
        asking = asyncio.create_task(c.http.post("/v1/chat/completions", json=chat_request(stream=True)))
        prompt = await peer.prompt()
        await prompt.publish_tokens("some")
        await prompt.event(TokenEvent(request=prompt.question.request, error=Busy("the cache is full").body()))
        response = await asking
    events = events_of(response.text)
    assert response.status_code == 200 and text_of(events) == "some"
    assert events[-1]["error"]["code"] == "busy"


async def test_stage_lost_in_the_middle_ends_the_stream_and_is_named(gateway: RunningGateway) -> None:
    async with running(gateway) as (c, peer):
        asking = asyncio.create_task(c.http.post("/v1/chat/completions", json=chat_request(stream=True)))
        prompt = await peer.prompt()
        await prompt.publish_tokens("some")
        await c.stage("i1", 0, "a", "failed")
        events = events_of((await asking).text)
        assert await peer.cancellation() == prompt.question.request
    assert text_of(events) == "some"
    assert events[-1]["error"]["code"] == "stage_lost" and "stage 0 on node a" in events[-1]["error"]["message"]


async def test_stage_lost_before_the_first_token_is_503(gateway: RunningGateway) -> None:
    async with running(gateway) as (c, peer):
        asking = asyncio.create_task(c.http.post("/v1/chat/completions", json=chat_request()))
        await peer.prompt()
        await c.stage("i1", 0, "a", "loading")
        assert error_of(await asking, 503)["code"] == "stage_lost"


async def test_a_lost_token_fails_the_answer_and_is_named(gateway: RunningGateway) -> None:
    async with running(gateway) as (c, peer):
        asking = asyncio.create_task(c.http.post("/v1/chat/completions", json=chat_request(stream=True)))
        prompt = await peer.prompt()
        await prompt.publish_tokens("a")
        await prompt.publish_tokens("c", "d", first=2, finish=True)
        events = events_of((await asking).text)
        assert await peer.cancellation() == prompt.question.request
    assert text_of(events) == "a"
    assert events[-1]["error"]["details"]["token_index"] == 1


@pytest.mark.parametrize("first", [[], ["a"]], ids=["before the first token", "after a token"])
async def test_I7_silence_ends_in_an_error_and_frees_the_slot(gateway: RunningGateway, first: list[str]) -> None:
    async with running(gateway) as (c, peer):
        asking = asyncio.create_task(c.http.post("/v1/chat/completions", json=chat_request()))
        prompt = await peer.prompt()
        await prompt.publish_tokens(*first)
        error = error_of(await asking, 504)
        assert await peer.cancellation() == prompt.question.request
    assert error["code"] == "expired" and "sent nothing" in error["message"]


async def test_answer_cancelled_by_somebody_else_is_an_error(gateway: RunningGateway) -> None:
    async with running(gateway) as (c, peer):
        asking = asyncio.create_task(c.http.post("/v1/chat/completions", json=chat_request()))
        prompt = await peer.prompt()
        await prompt.event(TokenEvent(request=prompt.question.request, finish_reason="cancelled"))
        assert error_of(await asking, 409)["code"] == "cancelled"


async def test_malformed_body_is_400_and_names_the_place(gateway: RunningGateway) -> None:
    async with running(gateway) as (c, _):
        broken = await c.http.post("/v1/chat/completions", content=b'{"model": "org/tiny", messages: []}')
        assert "byte 22" in error_of(broken, 400)["message"]
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"model": "org/tiny"}, "messages"),
            ({**chat_request(), "messages": []}, "$.messages"),
            ({**chat_request(), "messages": [{"role": "robot", "content": "x"}]}, "$.messages[0].role"),
            (chat_request(temperature=3), "$.temperature"),
            (chat_request(max_tokens=0), "$.max_tokens"),
            (chat_request(stop=["a", "b", "c", "d", "e"]), "$.stop"),
        ]
        for body, place in wrong:
            error = error_of(await c.http.post("/v1/chat/completions", json=body), 400)
            assert error["code"] == "bad_message" and place in error["message"], error


async def test_what_would_have_to_be_ignored_is_refused_and_named(gateway: RunningGateway) -> None:
    async with running(gateway) as (c, _):
        image = {"type": "image_url", "image_url": {"url": "data:,"}}
        refused: list[tuple[dict[str, Any], str]] = [
            (chat_request(n=2), "n"),
            (chat_request(logprobs=True), "logprobs"),
            (chat_request(tools=[{"type": "function"}]), "tools"),
            (chat_request(frequency_penalty=0.5), "frequency_penalty"),
            (chat_request(response_format={"type": "json_object"}), "response_format"),
            ({**chat_request(), "messages": [{"role": "user", "content": [image]}]}, "messages[0].content[0]"),
        ]
        for body, param in refused:
            error = error_of(await c.http.post("/v1/chat/completions", json=body), 400)
            assert (error["code"], error["param"]) == ("unsupported_parameter", param)


async def test_parameters_without_effect_and_text_parts_are_accepted(gateway: RunningGateway) -> None:
    async with running(gateway) as (c, peer):
        body = chat_request(
            n=1,
            tools=[],
            tool_choice="auto",
            logprobs=False,
            logit_bias={},
            presence_penalty=0,
            user="me",
            top_p=None,
        )
        body["messages"] = [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
        ]
        asking = asyncio.create_task(c.http.post("/v1/chat/completions", json=body))
        prompt = await peer.prompt()
        assert prompt.question.messages[0].content == "ab"
        await prompt.publish_tokens("ok", finish=True)
        assert (await asking).status_code == 200


async def test_messages_past_what_nats_carries_are_413(gateway: RunningGateway) -> None:
    async with running(gateway) as (c, _):
        body = {**chat_request(), "messages": [{"role": "user", "content": "x" * (1 << 20)}]}
        error = error_of(await c.http.post("/v1/chat/completions", json=body), 413)
    assert error["details"]["size_bytes"] > error["details"]["limit_bytes"]
