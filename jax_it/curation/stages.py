"""The stages by name."""

from collections.abc import Callable
from typing import Any

from jax_it.curation import convert, dedup, validate
from jax_it.curation.input import Input
from jax_it.curation.stage import Plan

# plan(settings, input); the class of a stage's settings is in `settings.SETTINGS`.
STAGES: dict[str, Callable[[Any, Input], Plan]] = {
    "validate": validate.plan,
    "dedup": dedup.plan,
    "convert": convert.plan,
}
