"""Conversations as text by the checkpoint's chat template, as Transformers' `apply_chat_template` renders them.

Tools, tool calls and reasoning reach the template under the names that it reads. A template is a program: it runs in
the sandbox of `data/jinja.py`, on a fixed day.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta

from jax_it.data.jinja import ImmutableEnvironment
from jax_it.data.jinja_text import random_name
from jax_it.data.records import InvalidRecord
from jax_it.data.templates import ToolCall, Turn
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError, shorten

_DATE = datetime.date(2024, 7, 26)  # what templates take for today: data must not change overnight

# The names by which templates read the reasoning of a message. Others find it in the content, between <think> tags.
_REASONING = {
    "reasoning_content": re.compile("reasoning_content"),  # Qwen3, DeepSeek, GLM
    "thinking": re.compile(r"""(message|\bm)\.thinking|\[['"]thinking['"]\]|['"]thinking['"] in"""),  # gpt-oss
    "reasoning": re.compile(r"""(message|\bm)\.reasoning\b|\[['"]reasoning['"]\]"""),
}
_THOUGHT = re.compile(r"\s*<think>\n?(.*?)\n?</think>\s*", re.DOTALL)

_PROBE_CALL = ToolCall("probe", {"city": "Paris", "days": 2}, "callprobe")  # Mistral's ids have nine characters
_PROBE_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "probe",
            "description": "A probe.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "A city."}}},
        },
    }
]
PROBE_CALL = (
    Turn("tools", json.dumps(_PROBE_TOOLS)),
    Turn("user", "Hi"),
    Turn("assistant", "", tool_calls=(_PROBE_CALL,)),
)


def name_of(tokenizer: Tokenizer) -> str:
    return f"the chat template of {tokenizer.template_name}"


def apply(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    where: str,
    generation: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Render turns, with further variables that the template reads, such as `enable_thinking`.

    Raises InvalidRecord for turns that the template refuses.
    """
    calls_as_text = any(turn.tool_calls for turn in turns) and _wants_text(tokenizer)
    messages = [_message(turn, tokenizer, calls_as_text) for turn in turns if turn.role != "tools"]
    tools = next((json.loads(turn.text) for turn in turns if turn.role == "tools"), None)
    return _render(messages, tools, tokenizer, where, generation, variables or {})


def with_reasoning(turns: Sequence[Turn], tokenizer: Tokenizer) -> list[Turn]:
    """Return the turns with thoughts in <think> tags moved from the text to the field where the template reads them."""
    if not _reasoning_name(tokenizer):
        return list(turns)
    found = []
    for turn in turns:
        match = _THOUGHT.match(turn.text) if turn.role == "assistant" and not turn.reasoning else None
        if match and match[1].strip():
            turn = turn._replace(reasoning=match[1], text=turn.text[match.end() :])
        found.append(turn)
    return found


def _reasoning_name(tokenizer: Tokenizer) -> str:
    template = tokenizer.chat_template or ""
    return next((name for name, used in _REASONING.items() if used.search(template)), "")


def _message(turn: Turn, tokenizer: Tokenizer, calls_as_text: bool) -> dict[str, Any]:
    text = turn.text
    extra: dict[str, Any] = {}
    if turn.reasoning:
        if name := _reasoning_name(tokenizer):
            extra[name] = turn.reasoning
        else:
            text = f"<think>\n{turn.reasoning}\n</think>\n\n{text}"
    calls = [{"name": call.name, "arguments": call.arguments} for call in turn.tool_calls]
    template = tokenizer.chat_template or ""
    if calls and "<tool_call>" in template and "tool_calls" not in template:
        # SmolLM3 asks for this form in its instructions, and has the calls in the text.
        written = "\n".join(f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in calls)
        text += written if not text or text.endswith("\n") else f"\n{written}"
    elif calls:
        if calls_as_text:
            calls = [call | {"arguments": json.dumps(call["arguments"], ensure_ascii=False)} for call in calls]
        extra["tool_calls"] = [
            {**({"id": call.id} if call.id else {}), "type": "function", "function": function}
            for call, function in zip(turn.tool_calls, calls, strict=True)
        ]
    if turn.tool_call_id:
        extra["tool_call_id"] = turn.tool_call_id
    if turn.name:
        extra["name"] = turn.name
    return {"role": turn.role, "content": text, **extra}


@functools.lru_cache(maxsize=8)
def _wants_text(tokenizer: Tokenizer) -> bool:
    """Return whether the template takes the arguments of a call as JSON text, and not as an object."""
    rendered = []
    for as_text in (False, True):
        messages = [_message(turn, tokenizer, as_text) for turn in PROBE_CALL[1:]]
        try:
            rendered.append(_render(messages, _PROBE_TOOLS, tokenizer, "a tool call", False, {}))
        except InvalidRecord:
            rendered.append("")
    of_object, of_text = rendered
    return bool(of_text) and (not of_object or repr(_PROBE_CALL.arguments) in of_object)


def _render(
    messages: Sequence[Mapping[str, Any]],
    tools: Any,
    tokenizer: Tokenizer,
    where: str,
    generation: bool,
    variables: Mapping[str, Any],
) -> str:
    template = tokenizer.chat_template or ""
    if not template.strip():
        raise UserError(
            f"{where}: {name_of(tokenizer)} is empty; set config.model.chat_template to 'default' or a file"
        )
    if name := random_name(template):
        raise UserError(
            f"{name_of(tokenizer)} uses {name!r}, whose result changes on every call; set another "
            "config.model.chat_template"
        )
    given: dict[str, Any] = {"messages": messages, "tools": tools, "documents": None}
    if tools and "xml_tools" in template:  # SmolLM3's name for them
        given["xml_tools"] = tools
    try:
        return _compiled(template).render(
            **{**tokenizer.backend.special_tokens_map, **variables, **given}, add_generation_prompt=generation
        )
    except Exception as error:  # a template may run any expression on any text
        reason = shorten(str(error), 300) or type(error).__name__
        raise InvalidRecord(f"{where}: {name_of(tokenizer)} does not take this conversation: {reason}") from None


@functools.lru_cache(maxsize=8)
def variables_of(template: str) -> frozenset[str]:
    """Return the names of the variables that a chat template reads. Raises jinja2.TemplateError."""
    return frozenset(jinja2.meta.find_undeclared_variables(_environment().parse(template)))


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


def _environment() -> ImmutableEnvironment:
    """Make an environment like that of Transformers for chat templates."""
    environment = ImmutableEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.add_filter("tojson", _to_json)
    environment.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
    return environment


class _Generation(jinja2.ext.Extension):
    """The tag around the assistant's text, whose body is rendered as if the tag were not there."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [jinja2.nodes.Scope(body).set_lineno(line)]


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return JSON without Jinja's HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    if len(format) > 100 or re.search(r"\d{3}", format):  # a width, which could be any
        raise jinja2.TemplateError("strftime_now takes a short format without widths")
    return _DATE.strftime(format)
