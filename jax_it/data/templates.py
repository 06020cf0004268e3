"""Templates: from a record to a prompt and the completions that answer it.

A template is a name of `TEMPLATES`, or Jinja text in which `|||` divides the prompt from the
completion, as in P3 ("{{question}} ||| {{answer}}"); further parts are further references.
"""

import copy
import itertools
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import jinja2

from jax_it.data.jinja import Environment
from jax_it.data.sources import Fields, Record, shown
from jax_it.errors import UserError, first_line


class Turn(NamedTuple):
    role: str  # "system", "user" or "assistant"
    text: str


class Example(NamedTuple):
    """A conversation that ends with the completion to learn, and every text that answers it as well."""

    turns: tuple[Turn, ...]
    references: tuple[str, ...]

    @property
    def prompt(self) -> str:
        return "\n\n".join(turn.text for turn in self.turns[:-1])

    @property
    def completion(self) -> str:
        return self.turns[-1].text


class Malformed(Exception):
    """Raised by a template for a record that it cannot take; `render` says where."""


class MissingField(Malformed):
    """Of a record that lacks a field."""


class Failed(Malformed):
    """Raised for Jinja text that cannot be computed from a record's fields."""


def render(record: Record, template: str) -> Example:
    """The record's example. Raises UserError naming the record and the field it lacks."""
    make = TEMPLATES.get(template) or _jinja(template)
    try:
        return _check_unicode(make(record.fields))
    except Malformed as error:
        raise _refused(error, record, template) from None


def _refused(error: Malformed, record: Record, template: str) -> UserError:
    if isinstance(error, Failed):
        fields = shown(f"{str(name)[:50]} ({type(value).__name__})" for name, value in record.fields.items())
        return UserError(f"{record.where}: template {_short(template)} fails: {error}; its fields: {fields or 'none'}")
    if not isinstance(error, MissingField):
        return UserError(f"{record.where}: {error}")
    fields = shown(record.fields) or "none"
    return UserError(f"{record.where}: {error}, which template {_short(template)} needs; its fields: {fields}")


def text(record: Record, template: str) -> str:
    """Jinja text with the record's fields, stripped. Raises UserError naming the record and the field it lacks."""
    return " ||| ".join(texts(record, template))


def texts(record: Record, template: str) -> list[str]:
    """The texts of Jinja text that `|||` divides, stripped. Raises as `text` does."""
    try:
        found = _compile(template)(record.fields)
        _check_unicode(Example((), tuple(found)))
    except Malformed as error:
        raise _refused(error, record, template) from None
    return found


def conversation(record: Record) -> tuple[Turn, ...]:
    """The turns of a record's messages, which end with the user, to generate an answer to. Raises UserError."""
    try:
        turns = turns_of(record.fields, answered=False)
        _check_unicode(Example(turns, ()))
    except Malformed as error:
        raise UserError(f"{record.where}: {error}") from None
    return turns


def _check_unicode(example: Example) -> Example:
    """JSON can spell half of a surrogate pair, which is no character and which tokenizers refuse."""
    for text in (*(turn.text for turn in example.turns), *example.references):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Malformed(f"{text[error.start]!r} is half of a surrogate pair, which is not text") from None
    return example


def _short(template: str) -> str:
    return repr(template if len(template) <= 60 else template[:57] + "...")


def _field(fields: Fields, *names: str) -> Any:
    for name in names:
        if fields.get(name) is not None:
            return fields[name]
    raise MissingField(f"field {' or '.join(map(repr, names))} is missing or null")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        quoted = " in quotes" if isinstance(value, (int, float)) else ""
        raise MissingField(f"field {name!r} is {type(value).__name__}, not the text{quoted}")
    return value


def _example(prompt: str, completions: Any, name: str, system: str = "") -> Example:
    """An example whose completion is the first of a list, or the only one; the rest are references."""
    references = completions if isinstance(completions, (list, tuple)) else [completions]
    texts = tuple(_text(text, name) for text in references) or ("",)
    turns = (Turn("user", prompt), Turn("assistant", texts[0]))
    return Example((Turn("system", system), *turns) if system else turns, texts)


def _prompt_completion(fields: Fields) -> Example:
    """{prompt, completion}; `completion` may be a list, whose first is learnt and all are references."""
    return _example(_text(_field(fields, "prompt"), "prompt"), _field(fields, "completion"), "completion")


def _prompt(fields: Fields) -> Example:
    """{prompt}, as it is: there is nothing to learn and no reference, as where programs are tried out."""
    return _example(_text(_field(fields, "prompt"), "prompt"), [], "completion")


def _alpaca(fields: Fields) -> Example:
    """{instruction, input, output}, as Stanford Alpaca; an empty input is left out."""
    instruction = _text(_field(fields, "instruction"), "instruction")
    given = fields.get("input") or ""
    prompt = f"{instruction}\n\n{_text(given, 'input')}" if given else instruction
    return _example(prompt, _field(fields, "output"), "output")


_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


def turns_of(fields: Fields, answered: bool) -> tuple[Turn, ...]:
    """The turns of {messages: [{role, content}]} or ShareGPT's {conversations: [{from, value}]}.

    User and assistant take turns, after a system turn or none; with `answered` the assistant has the last
    one, else the user. Raises Malformed for anything else.
    """
    messages = _field(fields, "messages", "conversations")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise Malformed("no list of messages with role and content")
    turns = [_turn(message, number) for number, message in enumerate(messages, 1)]
    if turns and turns[0].role == "system" and not turns[0].text.strip():
        del turns[0]
    spoken = [turn for turn in turns if turn.role != "system"]
    if not spoken:
        raise Malformed(f"no messages of user and assistant (roles: {', '.join(t.role for t in turns) or 'none'})")
    for number, turn in enumerate(turns, 1):
        if turn.role == "system" and number > 1:
            raise Malformed(f"message {number} is of the system, which speaks first or not at all")
    if spoken[0].role != "user":
        raise Malformed("the messages begin with the assistant; the user must speak first")
    for number, (one, two) in enumerate(itertools.pairwise(spoken), 2):
        if one.role == two.role:
            raise Malformed(f"two messages of the {one.role} in a row, the second of them turn {number}")
    last = "assistant" if answered else "user"
    if spoken[-1].role != last:
        raise Malformed(f"the messages end with the {spoken[-1].role}; the last one must be of the {last}")
    for number, turn in enumerate(spoken, 1):
        if not turn.text.strip() and not (answered and number == len(spoken)):
            raise Malformed(f"turn {number}, of the {turn.role}, is empty")
    return tuple(turns)


def _turn(message: dict[str, Any], number: int) -> Turn:
    role = _text(_field(message, "role", "from"), "role")
    role = _ROLES.get(role, role)
    if role not in ("system", "user", "assistant"):
        raise Malformed(f"message {number} has the role {_short(role)}, not system, user (human) or assistant (gpt)")
    if message.get("tool_calls") or message.get("function_call"):
        raise Malformed(f"message {number} calls a tool, which jax_it does not render")
    content = _field(message, "content", "value")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(_text(part.get("text"), "text") for part in content)
    return Turn(role, _text(content, "content"))


def _messages(fields: Fields) -> Example:
    """A conversation of any number of turns, whose last one is the completion."""
    turns = turns_of(fields, answered=True)
    return Example(turns, (turns[-1].text,))


def _super_ni(examples: int) -> Callable[[Fields], Example]:
    """An instance of a Super-NaturalInstructions task as Tk-Instruct sees it (Wang et al. 2022, appendix B)."""

    def make(fields: Fields) -> Example:
        definition = _field(fields, "Definition")
        if isinstance(definition, list):
            definition = definition[0] if definition else ""
        parts = [_ended(f"Definition: {_text(definition, 'Definition').strip()}") + "\n\n"]
        shown = fields.get("Positive Examples") or [] if examples else []
        if not isinstance(shown, list) or not all(isinstance(item, dict) for item in shown):
            raise Malformed("the field 'Positive Examples' is no list of examples with input and output")
        for number, item in enumerate(shown[:examples], 1):
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
    """Whichever of the templates above the record's fields fit."""
    for name, needed in _NEEDED.items():
        if any(key in fields for key in needed):
            return TEMPLATES[name](fields)
    raise MissingField("none of the fields " + ", ".join(repr(key) for keys in _NEEDED.values() for key in keys))


_NEEDED = {
    "messages": ("messages", "conversations"),  # first: some sets repeat the first message as "prompt"
    "prompt_completion": ("prompt",),
    "alpaca": ("instruction",),
    "super_ni": ("Definition",),
}

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


# What "|||" in a template is rendered as: a record's own bars divide nothing.
_DIVIDES = "|||62841973505826149370"


_ADDRESS = re.compile(" at 0x[0-9a-f]+>")  # of an object that Python prints, which differs from run to run


@cache
def random_name(text: str) -> str:
    """The name by which Jinja text asks for something random; "" where it does not."""
    try:
        words = [word for _, kind, word in jinja2.Environment().lex(text) if kind != "whitespace"]
    except jinja2.TemplateSyntaxError:  # whoever compiles it will say so
        return ""
    for before, word in itertools.pairwise(words):
        if word == "lipsum" or (before, word) == ("|", "random") or (before, word.strip("'\"")) == ("(", "random"):
            return word.strip("'\"")
    return ""


def _refuse_null(value: Any) -> Any:
    """Jinja would print None as text."""
    if value is None:
        raise jinja2.UndefinedError("a value that it prints is null")
    return value


@cache
def _jinja(text: str) -> Callable[[Fields], Example]:
    if "|||" not in text:
        known = ", ".join(TEMPLATES)
        raise UserError(f"template {_short(text)} is not one of {known}, and no Jinja text with '|||' in it")
    parts_of = _compile(text)

    def make(fields: Fields) -> Example:
        prompt, *completions = parts_of(fields)
        return _example(prompt, completions[:1] + [text for text in completions[1:] if text], "completion")

    return make


@cache
def _compile(text: str) -> Callable[[Fields], list[str]]:
    """What stands between the bars of Jinja text, as a function of a record's fields."""
    environment = Environment(undefined=jinja2.StrictUndefined, finalize=_refuse_null)
    if name := random_name(text):
        raise UserError(
            f"template {_short(text)} uses {name!r}, which gives other data each time; take 'choice', "
            "which draws by the options themselves"
        )
    del environment.filters["random"]
    environment.globals["choice"] = _choice
    environment.add_filter("choice", _choice)
    environment.add_filter("most_frequent", _most_frequent)
    try:
        template = environment.from_string(text.replace("|||", _DIVIDES))
    except Exception as error:  # of Jinja, and of Python, whose code Jinja makes of it
        deep = isinstance(error, (RecursionError, MemoryError))
        reason = "nested too deeply" if deep else shown([first_line(error)], length=200)
        raise UserError(f"template {_short(text)} is not valid Jinja: {reason}") from None

    def make(fields: Fields) -> list[str]:
        try:
            rendered = template.render(copy.deepcopy(fields))  # which a template may change
        except jinja2.UndefinedError as error:
            raise MissingField(str(error).replace("' is undefined", "' is missing")) from None
        except Exception as error:  # a template may run any expression on any data
            raise Failed(f"{type(error).__name__} ({shown([first_line(error)], length=200)})") from None
        if " at 0x" in rendered:
            for address in set(_ADDRESS.findall(rendered)):
                if address not in text and address not in str(fields):
                    raise Failed("it prints an object, not what that holds; add '| list' or '| join'")
        return [part.strip() for part in rendered.split(_DIVIDES)]

    return make


def _choice(options: Sequence[Any]) -> Any:
    """promptsource's `choice`, drawn by the options themselves, so that a template is a pure function."""
    options = list(options)
    return random.Random(repr(options)).choice(options)


def _most_frequent(items: Sequence[Any]) -> list[Any]:
    """promptsource's filter: the items that occur most often, in order of first occurrence."""
    counts = Counter(items)
    return [item for item, count in counts.items() if count == max(counts.values())]
