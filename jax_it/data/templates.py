"""Templates render a record as turns: a prompt and the completions that answer it.

A template is a name of `TEMPLATES`, or Jinja text in which `|||` separates the prompt from the completion, as in P3
("{{question}} ||| {{answer}}"); further parts are further references.
"""

import itertools
import math
import string
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from jax_it.data.jinja_text import Malformed, MissingField, RenderError, compile_template
from jax_it.data.records import Fields, InvalidRecord, Record, listed
from jax_it.errors import UserError, shorten, shown


class Turn(NamedTuple):
    role: str  # "system", "user" or "assistant"
    text: str


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


def render(record: Record, template: str) -> Example:
    """Return the record's example.

    Raises InvalidRecord that names the record and the field at fault, and UserError for an unknown template.
    """
    make = TEMPLATES.get(template) or _jinja(template)
    if record.error:
        raise InvalidRecord(record.error)
    try:
        example = make(record.fields)
        _check_unicode(*(turn.text for turn in example.turns), *example.references)
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
    make = TEMPLATES.get(template)
    if record.error:
        raise InvalidRecord(record.error)
    try:
        if make:
            example = make(_with_empty_completion(record.fields))
        else:
            example = _jinja(template, prompt_only=True)(record.fields)
        turns = example.turns[:-1]
        _check_unicode(*(turn.text for turn in turns))
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
        if (messages[-1].get("role") or messages[-1].get("from")) in ("user", "human"):
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


def _check_unicode(*texts: str) -> None:
    """Refuse half of a surrogate pair, which JSON can spell and tokenizers cannot encode."""
    for text in texts:
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
    """Return the turns of {messages: [{role, content}]} or ShareGPT's {conversations: [{from, value}]}.

    User and assistant alternate, after at most one system turn; the last turn is the assistant's. Raises Malformed for
    anything else.
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
        raise Malformed("the messages begin with the assistant, as many ShareGPT threads do; the user must speak first")
    for number, (one, two) in enumerate(itertools.pairwise(spoken), 2):
        if one.role == two.role:
            raise Malformed(f"two {one.role} messages in a row, the second of which is turn {number}")
    if spoken[-1].role != "assistant":
        raise Malformed("the messages end with the user; the last one must be the assistant's")
    for number, turn in enumerate(spoken, 1):
        if not turn.text.strip() and number < len(spoken):
            raise Malformed(f"turn {number}, the {turn.role}'s, is empty")
    return tuple(turns)


def _turn(message: dict[str, Any], number: int) -> Turn:
    role = _field(message, "role", "from")
    if not isinstance(role, str):
        raise MissingField(f"field 'role' is {type(role).__name__}, not text")
    role = _ROLES.get(role, role)
    if role not in ("system", "user", "assistant"):
        raise Malformed(f"message {number} has the role {shown(role, 60)}, not system, user (human) or assistant (gpt)")
    if message.get("tool_calls") or message.get("function_call"):
        raise Malformed(f"message {number} calls a tool, which jax_it does not render")
    content = _field(message, "content", "value")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(_text(part.get("text"), "text") for part in content)
    return Turn(role, _text(content, "content"))


def _messages(fields: Fields) -> Example:
    """Render a conversation of any number of turns, the last of which is the completion."""
    turns = _turns_of(fields)
    return Example(turns, (turns[-1].text,))


def _super_ni(examples: int) -> Callable[[Fields], Example]:
    """Return the template of Tk-Instruct for Super-NaturalInstructions (Wang et al. 2022, appendix B)."""

    def make(fields: Fields) -> Example:
        definition = _field(fields, "Definition")
        if isinstance(definition, list):
            definition = definition[0] if definition else ""
        parts = [_ended(f"Definition: {_text(definition, 'Definition').strip()}") + "\n\n"]
        given_examples = fields.get("Positive Examples") or [] if examples else []
        if not isinstance(given_examples, list) or not all(isinstance(item, dict) for item in given_examples):
            raise Malformed("the field 'Positive Examples' is not a list of examples with input and output")
        for number, item in enumerate(given_examples[:examples], 1):
            given = _ended(f"Input: {_text(_field(item, 'input'), 'input').strip()}")
            answer = _ended(f" Output: {_text(_field(item, 'output'), 'output').strip()}")
            parts.append(f" Positive Example {number} -\n{given}\n{answer}\n\n")
        given = _ended(f"Input: {_text(_field(fields, 'input'), 'input').strip()}")
        parts.append(f"Now complete the following example -\n{given}\nOutput:")
        return _example("".join(parts), _field(fields, "output"), "output")

    return make


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
    "super_ni": _super_ni(examples=2),
    "super_ni_1_example": _super_ni(examples=1),
    "super_ni_definition": _super_ni(examples=0),
}


@cache
def _jinja(text: str, prompt_only: bool = False) -> Callable[[Fields], Example]:
    if "|||" not in text:
        known = ", ".join(TEMPLATES)
        raise UserError(f"template {shown(text, 60)} is not one of {known}, nor Jinja text with '|||' in it")
    parts_of = compile_template(text, prompt_only)

    def make(fields: Fields) -> Example:
        prompt, *completions = parts_of(fields)
        return _example(prompt, completions[:1] + [text for text in completions[1:] if text], "completion")

    return make
