"""The stages by name."""

from collections.abc import Callable
from typing import Any

from jax_it.curation import convert, decontaminate, dedup, filter, sample, validate
from jax_it.curation.build import stage as build
from jax_it.curation.input import Input
from jax_it.curation.stage import Plan

# plan(settings, input); the class of a stage's settings is in `settings.SETTINGS`.
STAGES: dict[str, Callable[[Any, Input], Plan]] = {
    "validate": validate.plan,
    "dedup": dedup.plan,
    "decontaminate": decontaminate.plan,
    "filter": filter.plan,
    "sample": sample.plan,
    "build": build.plan,
    "convert": convert.plan,
}
