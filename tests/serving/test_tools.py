"""Calls of functions in texts, whole and in parts."""

import pytest

from jax_it.serving.responses import ChatResponse, Part
from jax_it.serving.schemas import ChatRequest
from jax_it.serving.tools import Call, content_so_far, split


def request(**fields) -> ChatRequest:
    tools = [{"type": "function", "function": {"name": name}} for name in ("add", "look_up")]
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}], "tools": tools, **fields})


ADD = Call("add", '{"a": 1}')


@pytest.mark.parametrize(
    "text, content, calls",
    [
        ('<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', "", [ADD]),
        ('Sure.\n<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>\n' * 2, "Sure.", [ADD, ADD]),
        ('[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]', "", [ADD]),
        ('{"name": "add", "parameters": {"a": 1}}', "", [ADD]),
        ('{"name": "add", "arguments": "{\\"a\\": 1}"}', "", [ADD]),
        ('{"name": "divide", "arguments": {}}', '{"name": "divide", "arguments": {}}', []),
        ("{not JSON", "{not JSON", []),
        ("<tool_call>broken</tool_call>", "<tool_call>broken</tool_call>", []),
        ("an answer", "an answer", []),
    ],
)
def test_calls_are_found_in_the_formats_of_chat_templates(text, content, calls):
    assert split(text, request()) == (content, calls)


def test_without_parallel_calls_the_first_one_counts():
    text = '[{"name": "add", "arguments": {"a": 1}}, {"name": "look_up", "arguments": {}}]'
    assert split(text, request(parallel_tool_calls=False))[1] == [ADD]


def test_what_may_be_the_beginning_of_a_call_is_not_shown():
    assert content_so_far("Sure <tool") == "Sure" and content_so_far(' {"na') == ""
    assert content_so_far("2 <3 ") == "2 <3"


@pytest.mark.parametrize("text", ['Sure. <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', "just text "])
def test_a_stream_of_a_call_is_what_the_whole_reply_has(text):
    response = ChatResponse(request(), "model", "id")
    parts = [Part(0, character, [], None) for character in text] + [Part(0, "", [], "stop")]
    deltas = [chunk["choices"][0] for part in parts for chunk in response.chunks(part)]
    content = "".join(choice["delta"].get("content", "") for choice in deltas)
    calls = [call["function"] for choice in deltas for call in choice["delta"].get("tool_calls", [])]
    (whole,) = ChatResponse(request(), "model", "id").whole({0: parts}, {})["choices"]
    assert content == (whole["message"]["content"] or "")
    assert calls == [call["function"] for call in whole["message"].get("tool_calls", [])]
    assert deltas[-1]["finish_reason"] == whole["finish_reason"] == ("tool_calls" if calls else "stop")
