"""Templates render a record as turns: a prompt and the completions that answer it.

A template is a name of `TEMPLATES`, or Jinja text in which `|||` separates the prompt from the completion, as in P3
("{{question}} ||| {{answer}}"); further parts are further references.
"""

import itertools
import json
import math
import re
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from jax_it.data.jinja_text import Malformed, MissingField, RenderError, compile_template
from jax_it.data.records import Fields, InvalidRecord, Record, listed
from jax_it.errors import UserError, first_line, shorten, shown


class ToolCall(NamedTuple):
    name: str
    arguments: dict[str, Any]
    id: str = ""


class Turn(NamedTuple):
    """A message of a conversation. One of the role "tools" comes first, and its text is a JSON list of the tools."""

    role: str  # "tools", "system", "user", "assistant" or "tool"
    text: str
    reasoning: str = ""  # the assistant's thought before the text
    tool_calls: tuple[ToolCall, ...] = ()  # of the assistant
    tool_call_id: str = ""  # of a tool: the call that it answers
    name: str = ""  # of a tool
    train: bool = True  # whether the loss counts the turn, if it is the assistant's


class Example(NamedTuple):
    """A conversation that ends with the completion, and every reference that answers it as well."""

    turns: tuple[Turn, ...]
    references: tuple[str, ...]

    @property
    def prompt(self) -> str:
        return "\n\n".join(turn.text for turn in self.turns[:-1])

    @property
    def completion(self) -> str:
        return self.turns[-1].text

    @property
    def is_blank(self) -> bool:
        """Whether a template gave no text at all, as one does that is meant for other records."""
        return self.is_plain and not any(turn.text.strip() for turn in self.turns)

    @property
    def is_plain(self) -> bool:
        """Whether the turns are texts alone, which need no chat template to be written."""
        return not any(turn.role in ("tools", "tool") or turn.reasoning or turn.tool_calls for turn in self.turns)

    def per_turn(self) -> list["Example"]:
        """Return an example for each of the assistant's turns that is trained on: the conversation up to it.

        One that has no such turn stays whole.
        """
        trained = [i for i, turn in enumerate(self.turns) if turn.role == "assistant" and turn.train]
        if trained in ([], [len(self.turns) - 1]):
            return [self]
        return [Example(self.turns[: i + 1], (self.turns[i].text,)) for i in trained]


def render(record: Record, template: str) -> Example:
    """Return the record's example.

    Raises InvalidRecord that names the record and the field at fault, and UserError for an unknown template.
    """
    make = _named(template) or _jinja(template)
    if record.error:
        raise InvalidRecord(record.error)
    try:
        example = make(record.fields)
        _check_unicode(*_texts_of(example.turns), *example.references)
    except Malformed as error:
        raise _invalid(error, record, template) from None
    return example


def texts(record: Record, template: str) -> list[str]:
    """Return the texts between the `|||` of Jinja text, stripped. Raises as `render` does."""
    try:
        found = compile_template(template)(record.fields)
        _check_unicode(*found)
    except Malformed as error:
        raise _invalid(error, record, template) from None
    return found


def text(record: Record, template: str) -> str:
    """Return what Jinja text renders, stripped. Raises as `render` does."""
    return " ||| ".join(texts(record, template))


def prompt(record: Record, template: str) -> tuple[Turn, ...]:
    """Return the turns that a completion answers. The completion is not read, and the record may lack it.

    Raises as `render` does.
    """
    make = _named(template)
    if record.error:
        raise InvalidRecord(record.error)
    try:
        if make:
            example = make(_with_empty_completion(record.fields))
        else:
            example = _jinja(template, prompt_only=True)(record.fields)
        turns = example.turns[:-1]
        _check_unicode(*_texts_of(turns))
    except Malformed as error:
        raise _invalid(error, record, template) from None
    return turns


def _with_empty_completion(fields: Fields) -> Fields:
    """Return the fields with an empty completion, for any of `TEMPLATES`."""
    found = fields | dict.fromkeys(("completion", "output"), "")
    for name in ("messages", "conversations"):
        messages = fields.get(name)
        if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
            continue
        if (messages[-1].get("role") or messages[-1].get("from")) in ("user", "human", "tool"):
            found[name] = [*messages, {"role": "assistant", "content": ""}]
    return found


def _invalid(error: Malformed, record: Record, template: str) -> InvalidRecord:
    """Return the error with the record's place and, where fields are at fault, with those that it has."""
    if isinstance(error, RenderError):
        fields = listed(f"{shorten(str(name), 50)} ({type(value).__name__})" for name, value in record.fields.items())
        return InvalidRecord(
            f"{record.where}: template {shown(template, 60)} fails: {error}; its fields: {fields or 'none'}"
        )
    if not isinstance(error, MissingField):
        return InvalidRecord(f"{record.where}: {error}")
    fields = listed(record.fields) or "none"
    message = f"{record.where}: {error}, which template {shown(template, 60)} needs; its fields: {fields}"
    printable = [name for name, value in record.fields.items() if name.isidentifier() and isinstance(value, str | int)]
    if template in TEMPLATES and len(printable) > 1:
        message += f"; try a template such as '{{{{{printable[0]}}}}} ||| {{{{{printable[1]}}}}}'"
    return InvalidRecord(message)


def _texts_of(turns: Iterable[Turn]) -> Iterator[str]:
    for turn in turns:
        yield from (turn.text, turn.reasoning)
        yield from (json.dumps(call.arguments, ensure_ascii=False) for call in turn.tool_calls)


def _check_unicode(*texts: str) -> None:
    """Refuse half of a surrogate pair, which JSON can spell and tokenizers cannot encode."""
    for text in texts:
        if text.isascii():  # most are, and this takes no time
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Malformed(f"{text[error.start]!r} is half of a surrogate pair, which is not text") from None


def _field(fields: Fields, *names: str) -> Any:
    for name in names:
        if fields.get(name) is not None:
            return fields[name]
    raise MissingField(f"field {' or '.join(map(repr, names))} is missing or null")


def _text(value: Any, name: str) -> str:
    """Return a field's text; a number, such as a label, becomes the text that Python prints."""
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if not isinstance(value, str):
        what = value if isinstance(value, float) else type(value).__name__
        raise MissingField(f"field {name!r} is {what}, not text")
    return value


def _example(prompt: str, completions: Any, name: str) -> Example:
    """Return an example whose completion is the first of a list, or the only one; the rest are references."""
    references = completions if isinstance(completions, (list, tuple)) else [completions]
    texts = tuple(_text(text, name) for text in references) or ("",)
    return Example((Turn("user", prompt), Turn("assistant", texts[0])), texts)


def _prompt_completion(fields: Fields) -> Example:
    """Render {prompt, completion}; of a list of completions the first is trained on, and all are references."""
    return _example(_text(_field(fields, "prompt"), "prompt"), _field(fields, "completion"), "completion")


def _prompt(fields: Fields) -> Example:
    """Render {prompt} alone, without a completion or reference, as for programs that are run."""
    return _example(_text(_field(fields, "prompt"), "prompt"), [], "completion")


def _alpaca(fields: Fields) -> Example:
    """Render {instruction, input, output}, as Stanford Alpaca has them; an empty input is left out."""
    instruction = _text(_field(fields, "instruction"), "instruction")
    given = fields.get("input") or ""
    prompt = f"{instruction}\n\n{_text(given, 'input')}" if given else instruction
    return _example(prompt, _field(fields, "output"), "output")


_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


def _turns_of(fields: Fields) -> tuple[Turn, ...]:
    """Return the turns of {messages: [{role, content}], tools} or ShareGPT's {conversations: [{from, value}]}.

    User and assistant alternate, after at most one system turn; the results of tools follow the turn that calls them;
    the last turn is the assistant's. Raises Malformed for anything else.
    """
    messages = _field(fields, "messages", "conversations")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise Malformed("the messages are not a list of objects with role and content")
    turns = [_turn(message, number) for number, message in enumerate(messages, 1)]
    if turns and turns[0].role == "system" and not turns[0].text.strip():
        del turns[0]
    spoken = [turn for turn in turns if turn.role != "system"]
    if not spoken:
        roles = ", ".join(turn.role for turn in turns) or "none"
        raise Malformed(f"neither the user nor the assistant has a message (roles: {roles})")
    for number, turn in enumerate(turns, 1):
        if turn.role == "system" and number > 1:
            raise Malformed(f"message {number} is a system message, which may only come first")
    if spoken[0].role != "user":
        raise Malformed(
            "the messages begin with the assistant, as many ShareGPT threads do; the user must speak first"
            if spoken[0].role == "assistant"
            else "the messages begin with a tool's result; the user must speak first"
        )
    calls = 0  # whose results are still to come
    for number, (one, two) in enumerate(itertools.pairwise(spoken), 2):
        if one.role == "assistant":
            calls = len(one.tool_calls)
        if two.role == "tool":
            if not calls:
                raise Malformed(f"turn {number} is a tool's result, and the assistant has called no tool that it is of")
            calls -= 1
        elif one.role == two.role:
            raise Malformed(f"two {one.role} messages in a row, the second of which is turn {number}")
        elif one.role == "tool" and two.role == "user":
            raise Malformed(f"turn {number} is the user's and follows a tool's result; the assistant must answer first")
    if spoken[-1].role != "assistant":
        whose = {"user": "the user", "tool": "a tool's result"}[spoken[-1].role]
        raise Malformed(f"the messages end with {whose}; the last one must be the assistant's")
    for number, turn in enumerate(spoken, 1):
        if not turn.text.strip() and number < len(spoken) and turn.role != "tool" and not turn.tool_calls:
            raise Malformed(f"turn {number}, the {turn.role}'s, is empty")
    tools = _tools(fields.get("tools"))
    return (*([Turn("tools", json.dumps(tools, ensure_ascii=False))] if tools else []), *turns)


def _tools(value: Any) -> list[dict[str, Any]]:
    """Return the tools of a record: a list of OpenAI's objects, or JSON text of it. Bare functions are wrapped."""
    if isinstance(value, str) and value.strip():
        value = _parsed(value, "field 'tools'")
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Malformed("the field 'tools' is not a list of objects, nor JSON text of one")
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in value]
    for number, tool in enumerate(tools, 1):
        function = tool["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise Malformed(
                f"tool {number} has no name; a tool is {{type: 'function', function: {{name, parameters}}}}"
            )
    return tools


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{what} is not valid JSON ({first_line(error)})") from None


def _turn(message: dict[str, Any], number: int) -> Turn:
    role = _field(message, "role", "from")
    if not isinstance(role, str):
        raise MissingField(f"field 'role' is {type(role).__name__}, not text")
    role = _ROLES.get(role, role)
    if role not in ("system", "user", "assistant", "tool"):
        raise Malformed(
            f"message {number} has the role {shown(role, 60)}, not system, user (human), assistant (gpt) or tool"
        )
    if message.get("function_call"):
        raise Malformed(f"message {number} has a function_call, OpenAI's older form; write it as tool_calls")
    train = _train(message, role, number)
    if role == "tool":
        id, name = (_text(message.get(key) or "", key) for key in ("tool_call_id", "name"))
        return Turn(role, _result(_field(message, "content", "value")), tool_call_id=id, name=name)
    if role != "assistant":
        return Turn(role, _content(_field(message, "content", "value")))
    reasoning = next((value for name in _REASONING if (value := message.get(name)) is not None), "")
    calls = _tool_calls(message.get("tool_calls") or (), number)
    spoken = message.get("content") if message.get("content") is not None else message.get("value")
    content = "" if spoken is None and calls else _content(_field(message, "content", "value"))
    return Turn(role, content, _text(reasoning, "reasoning_content").strip(), calls, train=train)


_REASONING = ("reasoning_content", "reasoning", "thinking")  # by the servers and templates of DeepSeek, vLLM, gpt-oss


def _train(message: dict[str, Any], role: str, number: int) -> bool:
    """Return whether a message is trained on: its `weight`, 0 or 1, as OpenAI has it, or its `train`, true or false."""
    given = {name: message[name] for name in ("weight", "train") if message.get(name) is not None}
    for name, value in given.items():
        if value not in (0, 1) or isinstance(value, str):
            known = "0 or 1" if name == "weight" else "true or false"
            raise Malformed(f"message {number} has the {name} {shown(str(value), 40)}, not {known}")
        if value and role != "assistant":
            raise Malformed(f"message {number} is the {role}'s and has {name}={value}; only assistants are trained on")
    if len({bool(value) for value in given.values()}) > 1:
        raise Malformed(f"message {number} has a weight and a train that contradict each other; keep one")
    return all(given.values())


def _content(content: Any) -> str:
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(_text(part.get("text"), "text") for part in content)
    return _text(content, "content")


def _result(content: Any) -> str:
    """Return the result of a tool as text: an object or a list as JSON."""
    if isinstance(content, dict | list) and not (content and all(_is_text_part(part) for part in content)):
        return json.dumps(content, ensure_ascii=False)
    return _content(content)


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text"


def _tool_calls(calls: Any, number: int) -> tuple[ToolCall, ...]:
    """Return the tool calls of a message, in OpenAI's form; arguments are an object, or JSON text of one."""
    if not isinstance(calls, list | tuple) or not all(isinstance(call, dict) for call in calls):
        raise Malformed(f"message {number}: tool_calls is not a list of objects")
    found = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise Malformed(
                f"message {number} calls a tool without a name; a call is "
                "{type: 'function', function: {name, arguments}}"
            )
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _parsed(arguments, f"message {number}: arguments") if arguments.strip() else {}
        if not isinstance(arguments, dict | None):
            raise Malformed(
                f"message {number}: the arguments of {function['name']!r} are not an object, nor JSON text of one"
            )
        found.append(ToolCall(function["name"], arguments or {}, _text(call.get("id") or "", "id")))
    return tuple(found)


def _messages(fields: Fields) -> Example:
    """Render a conversation of any number of turns, the last of which is the completion."""
    turns = _turns_of(fields)
    return Example(turns, (turns[-1].text,))


@dataclass(frozen=True)
class SuperNI:
    """The template of Tk-Instruct for Super-NaturalInstructions (Wang et al. 2022, appendix B), in one of its settings.

    By name: `super_ni` has the definition and two positive examples, `super_ni:def,pos=2,neg=2,expl` more.
    """

    definition: bool = False
    positive: int = 0  # examples
    negative: int = 0
    explanations: bool = False  # of the examples

    @classmethod
    def parse(cls, name: str) -> "SuperNI":
        """Read the part of the name after the colon. Raises UserError."""
        found: dict[str, Any] = {}
        for part in name.split(","):
            match = re.fullmatch(r"(def|expl)|(pos|neg)=(\d{1,3})", part.strip())
            if match is None:
                raise UserError(
                    f"template {shown(f'super_ni:{name}', 60)}: {part!r} is none of def, pos=K, neg=K and expl; "
                    "write for example 'super_ni:def,pos=2,neg=2,expl'"
                )
            field = {"def": "definition", "expl": "explanations", "pos": "positive", "neg": "negative"}
            found[field[match[1] or match[2]]] = int(match[3]) if match[3] else True
        return cls(**found)

    def __call__(self, fields: Fields) -> Example:
        parts = []
        if self.definition:
            definition = _field(fields, "Definition")
            if isinstance(definition, list):
                definition = definition[0] if definition else ""
            parts.append(_ended(f"Definition: {_text(definition, 'Definition').strip()}") + "\n\n")
        for kind, most in (("Positive", self.positive), ("Negative", self.negative)):
            given_examples = (fields.get(f"{kind} Examples") or []) if most else []
            if not isinstance(given_examples, list) or not all(isinstance(item, dict) for item in given_examples):
                raise Malformed(f"the field '{kind} Examples' is not a list of examples with input and output")
            for number, item in enumerate(given_examples[:most], 1):
                given = _ended(f"Input: {_text(_field(item, 'input'), 'input').strip()}")
                answer = _ended(f" Output: {_text(_field(item, 'output'), 'output').strip()}")
                explanation = _text(item.get("explanation") or "", "explanation").strip() if self.explanations else ""
                why = _ended(f" Explanation: {explanation}") + "\n" if explanation else ""
                parts.append(f" {kind} Example {number} -\n{given}\n{answer}\n{why}\n")
        given = _ended(f"Input: {_text(_field(fields, 'input'), 'input').strip()}")
        parts.append(f"Now complete the following example -\n{given}\nOutput:")
        return _example("".join(parts), _field(fields, "output"), "output")


def _ended(text: str) -> str:
    return text if text[-1] in string.punctuation else f"{text}."


def _auto(fields: Fields) -> Example:
    """Render by the first of the templates above whose fields the record has.

    Some sets repeat the first user message as "prompt"; a prompt that differs from it leaves open what is meant.
    """
    fitting = shapes(fields)
    if not fitting:
        needed_fields = ", ".join(repr(key) for keys in _NEEDED.values() for key in keys)
        raise MissingField(f"has none of the fields {needed_fields}")
    example = TEMPLATES[fitting[0]](fields)
    if fitting[:2] == ["messages", "prompt_completion"]:
        asked = next(turn.text for turn in example.turns if turn.role == "user")
        if fields["prompt"] != asked:
            raise Malformed(
                "it has both 'messages' and 'prompt', and they differ; set the template to 'messages' or "
                "'prompt_completion'"
            )
    return example


def shapes(fields: Fields) -> list[str]:
    """Return the templates whose fields a record has; "auto" renders it by the first."""
    fitting = [name for key, name in _SHAPES if fields.get(key) is not None]
    return list(dict.fromkeys(fitting or [name for key, name in _SHAPES if key in fields]))


_NEEDED = {
    "messages": ("messages", "conversations"),
    "prompt_completion": ("prompt",),
    "alpaca": ("instruction",),
    "super_ni": ("Definition",),
}
_SHAPES = [(key, name) for name, keys in _NEEDED.items() for key in keys]

TEMPLATES: dict[str, Callable[[Fields], Example]] = {
    "auto": _auto,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "messages": _messages,
    "prompt": _prompt,
    "super_ni": SuperNI(definition=True, positive=2),
    "super_ni_1_example": SuperNI(definition=True, positive=1),
    "super_ni_definition": SuperNI(definition=True),
}


@cache
def _named(name: str) -> Callable[[Fields], Example] | None:
    """Return the template of this name; None for Jinja text."""
    if name.startswith("super_ni:"):
        return SuperNI.parse(name.removeprefix("super_ni:"))
    return TEMPLATES.get(name)


@cache
def _jinja(text: str, prompt_only: bool = False) -> Callable[[Fields], Example]:
    if "|||" not in text:
        known = ", ".join(TEMPLATES)
        raise UserError(
            f"template {shown(text, 60)} is not one of {known}, nor Jinja text with '|||' in it, nor promptsource:NAME"
        )
    parts_of = compile_template(text, prompt_only)

    def make(fields: Fields) -> Example:
        prompt, *completions = parts_of(fields)
        return _example(prompt, completions[:1] + [text for text in completions[1:] if text], "completion")

    return make
