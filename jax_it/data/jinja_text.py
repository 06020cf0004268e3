"""Jinja templates over a record's fields, in which `|||` separates the prompt from its completions, as in P3."""

import copy
import itertools
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jinja2

from jax_it.data.jinja import Environment, render_before
from jax_it.data.records import Fields
from jax_it.errors import UserError, first_line, shorten, shown


class Malformed(Exception):
    """Raised by a template for a record that it cannot render; `templates.render` adds where the record is."""


class MissingField(Malformed):
    """Raised for a record that lacks a field, or has one of another type."""


class RenderError(Malformed):
    """Raised for Jinja text that cannot be computed from a record's fields."""


# What "|||" in a template is rendered as, so that bars in a record's own text separate nothing.
_DIVIDES = "|||62841973505826149370"


_state = threading.local()  # of this thread: .fields, which are rendered, and .chosen, how often one was chosen

_ADDRESS = re.compile(" at 0x[0-9a-f]+>")  # of an object that Python prints, which differs from run to run


@cache
def random_name(text: str) -> str:
    """Return the name by which Jinja text asks for something random, or ""."""
    try:
        words = [word for _, kind, word in jinja2.Environment().lex(text) if kind != "whitespace"]
    except jinja2.TemplateSyntaxError:  # whoever compiles it will say so
        return ""
    for before, word in itertools.pairwise(words):
        if word == "lipsum" or (before, word) == ("|", "random") or (before, word.strip("'\"")) == ("(", "random"):
            return word.strip("'\"")
    return ""


def _refuse_null(value: Any) -> Any:
    """Refuse None, which Jinja would print as text."""
    if value is None:
        raise jinja2.UndefinedError("a value that it prints is null")
    return value


_CHOICES = re.compile(r"\{% set answer_choices %\}(.*?)\{% endset %\}\{% set answer_choices = ", re.DOTALL)


def with_answer_choices(text: str, choices: str | None) -> str:
    """Return promptsource's Jinja text with its choices, Jinja text "A ||| B", as the list `answer_choices`.

    What it chooses at random is chosen by the record, the same each time.
    """
    text = re.sub(r"\|\s*(random|choice)\b", "| choice_of_record", text)
    text = re.sub(r"\bchoice\s*\(", "choice_of_record(", text)
    if not choices:
        return text
    setting = "{% set answer_choices %}" + choices + "{% endset %}{% set answer_choices = answer_choices | choices %}"
    return setting + text


def answer_choices(text: str) -> str:
    """Return the choices that `with_answer_choices` put into a template's text, as Jinja text; "" where it did not."""
    match = _CHOICES.match(text)
    return match[1] if match else ""


@cache
def compile_template(text: str, prompt_only: bool = False) -> Callable[[Fields], list[str]]:
    """Return a function from a record's fields to the texts between the bars of Jinja text, stripped.

    With `prompt_only` it is the text before the first bar, and the rest is not computed. The function raises
    MissingField for a field that is missing or null, and RenderError for text that cannot be computed. Raises UserError
    for text that is not valid Jinja, or whose result is random.
    """
    environment = Environment(undefined=jinja2.StrictUndefined, finalize=_refuse_null)
    if name := random_name(text):
        raise UserError(
            f"template {shown(text, 60)} uses {name!r}, whose result changes on every call; use 'choice', "
            "which is deterministic"
        )
    del environment.filters["random"]
    environment.globals["choice"] = _choice
    environment.globals |= {"choice_of_record": _choice_of_record, "zip": _zip}
    environment.add_filter("choice_of_record", _choice_of_record)
    environment.add_filter("choice", _choice)
    environment.add_filter("choices", _split)
    environment.add_filter("most_frequent", _most_frequent)
    try:
        template = environment.from_string(text.replace("|||", _DIVIDES))
    except Exception as error:  # of Jinja, and of Python, whose code Jinja makes of it
        deep = isinstance(error, (RecursionError, MemoryError))
        reason = "nested too deeply" if deep else shorten(first_line(error), 200)
        raise UserError(f"template {shown(text, 60)} is not valid Jinja: {reason}") from None

    def make(fields: Fields) -> list[str]:
        copied = copy.deepcopy(fields)  # which a template may change
        _state.fields, _state.chosen = fields, 0
        try:
            rendered = render_before(template, _DIVIDES, copied) if prompt_only else template.render(copied)
        except jinja2.UndefinedError as error:
            raise MissingField(str(error).replace("' is undefined", "' is missing")) from None
        except Exception as error:  # a template may run any expression on any data
            raise RenderError(f"{type(error).__name__} ({shorten(first_line(error), 200)})") from None
        if " at 0x" in rendered:
            for address in set(_ADDRESS.findall(rendered)):
                if address not in text and address not in str(fields):
                    raise RenderError("it prints an object, not the items in it; add '| list' or '| join'")
        return [part.strip() for part in rendered.split(_DIVIDES)]

    return make


def _choice(options: Sequence[Any]) -> Any:
    """Choose one option as promptsource's `choice` does, but seeded by the options: a template is a pure function."""
    options = list(options)
    return random.Random(repr(options)).choice(options)


@jinja2.pass_context  # so that it is not a constant
def _choice_of_record(_: Any, options: Sequence[Any]) -> Any:
    """Choose one option, seeded by the record and how often it has chosen: P3's templates draw orders with it."""
    options = list(options)
    _state.chosen += 1
    return random.Random(repr((options, _state.chosen, _state.fields))).choice(options)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(_DIVIDES)]


def _zip(*columns: Any) -> list[tuple[Any, ...]]:
    """Return rows as a list, which the environment measures, of values that it has measured."""
    return list(zip(*columns, strict=False))


def _most_frequent(items: Sequence[Any]) -> list[Any]:
    """Return the items that occur most often, in order of first occurrence, as promptsource's filter does."""
    counts = Counter(items)
    return [item for item, count in counts.items() if count == max(counts.values())]
