"""The templates that a run was trained with, for clients that fill in their fields."""

from collections.abc import Iterator
from typing import Any

import jinja2
import jinja2.meta

from jax_it.data import templates
from jax_it.data.records import Record
from jax_it.errors import UserError
from jax_it.run import Run
from jax_it.serving.errors import ApiError


def describe(run: Run) -> list[dict[str, Any]]:
    """Return the templates of a run's training data that have fields to fill in, as {"template", "fields"}.

    A model that is not a run's has none. Of the named templates only "alpaca" has fields that a person would type.
    """
    found = [{"template": text, "fields": _fields(text)} for text in _templates(run)]
    return [each for each in found if each["fields"]]


def render(run: Run, template: str, fields: dict[str, str]) -> str:
    """Return the prompt that one of a run's templates makes of fields.

    Raises ApiError for a template that the run does not have, and for fields that it cannot be rendered with.
    """
    if template not in _templates(run):
        raise ApiError(400, "the run has no such template; /v1/models lists its templates", "template")
    try:
        turns = templates.prompt(Record(fields, "the request"), template)
    except UserError as error:
        raise ApiError(400, str(error), "fields") from None
    return "\n\n".join(turn.text for turn in turns)


def _templates(run: Run) -> list[str]:
    return list(dict.fromkeys(text for source in run.config.data.train for text in source.template))


def _fields(template: str) -> list[str]:
    """Return the names that the prompt of a template reads, in order of their first appearance."""
    if template in templates.TEMPLATES:
        return ["instruction", "input"] if template == "alpaca" else []
    for text in _prompt_and_whole(template):
        try:
            names = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(text))
        except jinja2.TemplateSyntaxError:
            continue
        return sorted(names - {"choice"}, key=text.find)
    return []


def _prompt_and_whole(template: str) -> Iterator[str]:
    """Yield the text before the first bar, which is not Jinja by itself if a block spans the bar, and all of it."""
    yield template.partition("|||")[0]
    yield template
