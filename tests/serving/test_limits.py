"""Keys, full queues, time limits, clients that go away, engines that fail, and what is logged."""

import asyncio
import dataclasses
import io
import json
import time

import httpx2 as httpx
import pytest

from jax_it.generation import Scheduler
from jax_it.serving.access_log import AccessLog
from tests.serving.conftest import LIMITS, events

CHAT = {"messages": [{"role": "user", "content": "Say hello"}], "ignore_eos": True}
PATH = "/v1/chat/completions"


def test_a_key_is_needed_for_all_but_health_and_the_page(served):
    locked = served.with_options(keys=["one", "zwei"])
    for authorization in ("", "Bearer", "Bearer on", "Bearer oneone", "Basic one", "one", "Bearer onë"):
        headers = {"authorization": authorization.encode()} if authorization else {}
        response = locked.get("/v1/models", **headers)
        assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    for key in ("one", "zwei"):
        assert locked.get("/v1/models", authorization=f"Bearer {key}").status_code == 200
    for path in ("/docs", "/openapi.json", "/metrics", "/nothing"):
        assert locked.get(path).status_code == 401
    for path in ("/health", "/"):  # the page asks for a key itself
        assert locked.get(path).status_code == 200


def test_other_origins_are_refused_unless_they_are_named(served):
    origin = {"origin": "https://page.example"}
    assert "access-control-allow-origin" not in served.get("/v1/models", **origin).headers
    opened = served.with_options(cors=["https://page.example"], keys=["one"])

    async def ask() -> httpx.Response:
        async with opened.client(**origin) as client:
            return await client.options(PATH, headers={"access-control-request-method": "POST"})

    response = asyncio.run(ask())
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://page.example"
    assert "access-control-allow-origin" not in opened.get("/v1/models", origin="https://other.example").headers


def test_a_full_queue_is_said_with_the_time_to_wait(served, slow_steps):
    small = served.with_options(dataclasses.replace(LIMITS, max_queue=1))

    async def ask_all() -> list[httpx.Response]:
        async with small.client() as client:
            return await asyncio.gather(*(client.post(PATH, json=CHAT) for _ in range(7)))

    answers = asyncio.run(ask_all())
    full = [response for response in answers if response.status_code == 429]
    assert len(full) == 2 and [response.status_code for response in answers].count(200) == 5
    assert full[0].json()["error"]["type"] == "rate_limit_error" and int(full[0].headers["retry-after"]) >= 1


def test_a_request_that_takes_too_long_ends_with_an_error(served, slow_steps):
    short = served.with_options(dataclasses.replace(LIMITS, timeout=0.3))
    response = short.post(PATH, CHAT)
    assert response.status_code == 503 and response.json()["error"]["code"] == "timeout"
    *chunks, error = events(short.post(PATH, CHAT | {"stream": True}).text)
    assert error["error"]["code"] == "timeout" and chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert short.server.unfinished == 0


def test_a_server_that_shuts_down_refuses_new_requests(served):
    closing = served.with_options()
    closing.server.is_draining = True
    for response in (closing.post(PATH, CHAT), closing.get("/health")):
        assert response.status_code == 503 and int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slot(served, slow_steps, listening, stream):
    url = listening(served)
    scheduler = served.workers._of_models["llama"].scheduler
    with httpx.Client(timeout=0.4 if not stream else 60) as client:
        if stream:
            with client.stream("POST", url + PATH, json=CHAT | {"stream": True}) as response:
                next(response.iter_lines())
                assert scheduler.num_running == 1
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(url + PATH, json=CHAT)
        began = time.monotonic()
        while scheduler.has_unfinished and time.monotonic() < began + 5:
            time.sleep(0.01)
        assert time.monotonic() - began < 0.6, "24 steps of a twentieth of a second were not all made"


def test_an_idle_stream_has_comments(served, slow_steps, listening, monkeypatch):
    monkeypatch.setattr("jax_it.serving.streaming.KEEP_ALIVE", 0.01)
    response = httpx.post(listening(served) + PATH, json=CHAT | {"stream": True, "max_tokens": 3}, timeout=60)
    assert ": keep-alive\n\n" in response.text and events(response.text)[-1] == "[DONE]"


def test_a_request_that_the_engine_fails_with_fails_alone(served, monkeypatch):
    step = Scheduler.step
    poison = [7, 11, 13]

    def failing(self):
        waiting = [prompt.request for prompt in self._queue] + [text.request for text in self._slots if text]
        if any(list(request.prompt) == poison for request in waiting):
            raise RuntimeError("the device is gone")
        return step(self)

    good = {"prompt": "Say hello", "ignore_eos": True}
    text = served.post("/v1/completions", good).json()["choices"][0]["text"]
    monkeypatch.setattr(Scheduler, "step", failing)

    async def ask_all() -> list[httpx.Response]:
        async with served.client() as client:
            bodies = [good, good | {"stream": True}, {"prompt": poison}, good]
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))

    first, streamed, failed, last = asyncio.run(ask_all())
    assert failed.status_code == 500 and "the device is gone" in failed.json()["error"]["message"]
    assert [response.json()["choices"][0]["text"] for response in (first, last)] == [text] * 2
    assert "".join(chunk["choices"][0]["text"] for chunk in events(streamed.text)[:-1]) == text
    assert served.get("/health").status_code == 200


def test_each_request_is_logged_in_a_line_without_its_prompt(served):
    for with_prompts in (False, True):
        stream = io.StringIO()
        logged = served.with_options(log=AccessLog(stream, with_prompts))
        response = logged.post(PATH, CHAT | {"user": "me"})
        logged.get("/nothing")
        line, missing = map(json.loads, stream.getvalue().splitlines())
        assert line["status"] == 200 and line["path"] == PATH and line["model"] == "llama" and line["user"] == "me"
        assert line["completion_tokens"] == 24 and line["finish_reason"] == "length"
        assert line["request_id"] == response.headers["x-request-id"] and missing["status"] == 404
        assert ("Say hello" in stream.getvalue()) == with_prompts


def test_a_body_that_does_not_arrive_is_not_waited_for(served):
    impatient = served.with_options(dataclasses.replace(LIMITS, body_timeout=0.05))

    async def slow():
        yield b'{"mess'
        await asyncio.sleep(5)

    async def ask() -> httpx.Response:
        async with impatient.client() as client:
            return await client.post(PATH, content=slow(), headers={"content-type": "application/json"})

    began = time.monotonic()
    assert asyncio.run(ask()).status_code == 408 and time.monotonic() < began + 4


@pytest.mark.parametrize("parameters", [{"type": "\ud800"}, {"maximum": float("nan")}, {"$ref": "#"}, {"pattern": "("}])
def test_hostile_schemas_are_refused_or_kept(served, parameters):
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    for choice in ("auto", "required"):
        body = json.dumps(CHAT | {"tools": [tool], "tool_choice": choice, "max_tokens": 2})
        response = served.post(PATH, body.encode(), **{"content-type": "application/json"})
        assert response.status_code in (200, 400), response.text
