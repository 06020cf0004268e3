"""The settings of all stages: on the command line --keep-by, in a recipe `keep_by`. Light to import, for the parser.

A new stage is a dataclass here, a module with its `plan`, and a line in `STAGES` of stages.py.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

Part = Literal["prompt", "completion", "both"]


def setting(default: Any, help: str) -> Any:
    """Return a field with its default and the text of `--help`."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Validate:
    """Find the faults of all records: what cannot be read or rendered, broken text, empty prompts and completions."""

    fix: bool = setting(False, "mend mojibake, control characters and surrogates; records that stay faulty are dropped")
    tokenizer: str = setting("", "a folder, file or hub name: also count what this tokenizer loses or does not know")
    max_tokens: int = setting(2048, "with a tokenizer: count records with more tokens than this")


@dataclass(frozen=True)
class Dedup:
    """Drop records that say the same as another."""

    method: Literal["exact", "near", "semantic"] = setting(
        "near", "exact: the same text but for case and spacing; near: or similar words; semantic: or similar meaning"
    )
    on: Part = setting("both", "what is compared")
    keep: str = setting("first", "which record of a group stays: first, longest, or best:FIELD for the largest number")
    threshold: float = setting(0.72, "for near: share of word 5-grams that two texts have in common, from which on")
    model: str = setting(
        "", "for semantic: a run, a Transformers folder or a hub name, whose encoder states are compared"
    )
    semantic_threshold: float = setting(0.95, "for semantic: cosine of two texts' mean states, from which on")


@dataclass(frozen=True)
class Convert:
    """Rewrite records in another shape or file format."""

    to: Literal["same", "prompt_completion", "alpaca", "messages", "sharegpt"] = setting(
        "same", "the shape: {prompt, completion}, {instruction, input, output}, {messages} or {conversations}"
    )
    keep_fields: bool = setting(False, "keep the fields that are not part of the old shape, such as id and task")


@dataclass(frozen=True)
class Stats:
    """Describe data sets: lengths, tasks, languages, turns, duplicates, what instructions begin with."""

    task: str = setting("task", "the field that names a record's task")
    json: str = setting("", "a file for the figures as JSON")
    html: str = setting("", "a file for a page with the figures and plots")


SETTINGS: dict[str, type] = {
    "validate": Validate,
    "dedup": Dedup,
    "convert": Convert,
}
