"""The openai package, which no one here wrote, over a real connection, and the requests that Open WebUI makes."""

import asyncio
import json

import httpx2 as httpx
import openai
import pytest

from tests.serving.conftest import events

MESSAGES = [{"role": "user", "content": "Say hello"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look up a color",
        "parameters": {
            "type": "object",
            "properties": {"of": {"enum": ["sky", "grass"]}},
            "required": ["of"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def client(served, listening):
    return openai.OpenAI(base_url=f"{listening(served)}/v1", api_key="any", max_retries=0)


def test_replies_and_streams(client):
    assert [model.id for model in client.models.list()] == ["llama", "t5"]
    reply = client.chat.completions.create(model="llama", messages=MESSAGES, max_tokens=9)
    assert reply.usage.completion_tokens == 9 and reply.choices[0].finish_reason == "length"
    stream = client.chat.completions.create(model="llama", messages=MESSAGES, max_tokens=9, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == reply.choices[0].message.content
    completion = client.completions.create(model="t5", prompt=["Say hello", "Who?"], max_tokens=4)
    assert [choice.index for choice in completion.choices] == [0, 1]


def test_async_streams_side_by_side(served, listening):
    url = listening(served)

    async def ask(client: openai.AsyncOpenAI, text: str) -> str:
        stream = await client.chat.completions.create(
            model="llama", messages=[{"role": "user", "content": text}], stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any") as client:
            return await asyncio.gather(*(ask(client, text) for text in ("Say hello", "Who are you?") * 4))

    texts = asyncio.run(ask_all())
    assert texts == texts[:2] * 4 and texts[0] != texts[1]


def test_errors_are_the_exceptions_that_the_client_has_for_them(client, served, listening):
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.chat.completions.create(model="gpt", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="unknown field 'reasoning_effort'") as error:
        client.chat.completions.create(model="llama", messages=MESSAGES, reasoning_effort="low")
    assert error.value.param == "reasoning_effort" and error.value.code == "unknown_field"
    locked = openai.OpenAI(base_url=f"{listening(served.with_options(keys=['one']))}/v1", api_key="two", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        locked.models.list()
    assert locked.with_options(api_key="one").models.list().data


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look_up"}}])
def test_a_function_that_has_to_be_called_is_called(client, choice):
    settings = {"model": "llama", "messages": MESSAGES, "tools": [TOOL], "tool_choice": choice, "seed": 1}
    settings |= {"parallel_tool_calls": False, "extra_body": {"repetition_penalty": 1.0}, "temperature": 0}
    reply = client.chat.completions.create(**settings)
    if reply.choices[0].finish_reason == "length":  # a text of random weights, as long as it may be
        return
    (call,) = reply.choices[0].message.tool_calls
    assert call.function.name == "look_up" and json.loads(call.function.arguments)["of"] in ("sky", "grass")
    assert reply.choices[0].finish_reason == "tool_calls" and not reply.choices[0].message.content
    chunks = [*client.chat.completions.create(**settings, stream=True)]
    (streamed,) = [each for chunk in chunks for each in chunk.choices[0].delta.tool_calls or []]
    assert streamed.function.arguments == call.function.arguments and streamed.index == 0
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_schema_is_kept(client):
    schema = {"type": "json_schema", "json_schema": {"name": "color", "strict": True, "schema": {"enum": ["red", 7]}}}
    reply = client.chat.completions.create(model="llama", messages=MESSAGES, response_format=schema)
    assert json.loads(reply.choices[0].message.content) in ("red", 7)


def test_requests_of_open_webui_are_answered(served, listening):
    """As its backend sends them: the models, an answer that streams with the settings of a chat, a title, tags."""
    with httpx.Client(
        base_url=f"{listening(served)}/v1", headers={"Authorization": "Bearer any"}, timeout=60
    ) as client:
        model = client.get("/models").json()["data"][0]
        assert model["id"] == "llama" and model["object"] == "model"
        settings = {
            "temperature": 0.7, "top_p": 0.9, "max_tokens": 8, "frequency_penalty": 0.5, "presence_penalty": 0.1,
            "seed": 1, "stop": ["###"], "logit_bias": {"5": -10}, "top_k": 40, "min_p": 0.05,
        }  # fmt: skip
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hello"}]
        answer = {"stream": True, "stream_options": {"include_usage": True}, "model": model["id"], "messages": messages}
        for body in (answer, answer | settings):
            *chunks, usage, done = events(client.post("/chat/completions", json=body).text)
            assert done == "[DONE]" and usage["usage"]["total_tokens"] and chunks[-1]["choices"][0]["finish_reason"]
        title = {"model": model["id"], "messages": messages[1:], "stream": False}
        for limit in ({}, {"max_completion_tokens": 20}, {"max_tokens": 20}):  # of tags, and of titles
            reply = client.post("/chat/completions", json=title | limit).json()["choices"][0]["message"]
            assert reply["role"] == "assistant" and reply["content"]
        refused = client.post("/chat/completions", json=title | {"max_completion_tokens": 1000})
        assert refused.status_code == 400 and "--max-new-tokens" in refused.json()["error"]["message"]
