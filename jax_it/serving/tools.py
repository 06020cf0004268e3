"""Calls of functions in a text: how they are found, and how a text is made to be one."""

import json
from typing import Any, NamedTuple

from jax_it.serving.detokenizer import overlap
from jax_it.serving.schemas import ChatRequest, Tool, ToolChoice

OPENING, CLOSING = "<tool_call>", "</tool_call>"  # of Hermes, Qwen, SmolLM and others
MISTRAL = "[TOOL_CALLS]"


class Call(NamedTuple):
    name: str
    arguments: str  # JSON


def forced_schema(request: ChatRequest) -> dict[str, Any] | None:
    """Return the JSON schema of a text that has to be a call; None where the model chooses."""
    if isinstance(request.tool_choice, ToolChoice):
        (tool,) = [each for each in request.tools if each.function.name == request.tool_choice.function.name]
        return _parameters(tool)
    if request.tool_choice != "required":
        return None
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "arguments": _parameters(tool)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in request.tools
    ]
    most = {} if request.parallel_tool_calls else {"maxItems": 1}
    return {"type": "array", "minItems": 1, **most, "items": {"anyOf": calls}}


def _parameters(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or {"type": "object"}


def content_so_far(text: str) -> str:
    """Return how much of a growing text is an answer to be shown, and not a call or the beginning of one."""
    if text.lstrip()[:1] in ("{", "["):
        return ""
    before, found, _ = text.partition(OPENING)
    shown = before if found else text[: len(text) - overlap(text, OPENING)]
    return shown.rstrip()  # white space before a call is not content


def split(text: str, request: ChatRequest) -> tuple[str, list[Call]]:
    """Return a text's content, and its calls of the request's functions.

    A text is calls if it is `<tool_call>` blocks, `[TOOL_CALLS]` and a list, or nothing but JSON of a call or a list of
    them; anything else is content.
    """
    if isinstance(request.tool_choice, ToolChoice):
        return "", [Call(request.tool_choice.function.name, text)]
    names = {tool.function.name for tool in request.tools}
    if OPENING in text:
        content, *blocks = text.split(OPENING)
        calls = [call for block in blocks for call in _read(block.partition(CLOSING)[0], names)]
    else:
        content, calls = "", _read(text.strip().removeprefix(MISTRAL), names)
    if not calls:
        return text, []
    return content.rstrip(), calls if request.parallel_tool_calls else calls[:1]


def _read(text: str, names: set[str]) -> list[Call]:
    """Return the calls that a text is, if it is nothing else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls: list[Call] = []
    for each in found if isinstance(found, list) else [found]:
        if not isinstance(each, dict) or each.get("name") not in names:
            return []
        arguments = each.get("arguments", each.get("parameters", {}))
        calls.append(Call(each["name"], arguments if isinstance(arguments, str) else _dump(arguments)))
    return calls


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
