"""The settings of all stages: on the command line --keep-by, in a recipe `keep_by`. Light to import, for the parser.

A new stage is a dataclass here, a module with its `plan`, and a line in `STAGES` of stages.py.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

Fields = Literal["prompt", "completion", "both"]


def setting(default: Any, help: str) -> Any:
    """Return a field with its default and the text of `--help`."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Convert:
    """Rewrite records in another shape or file format."""

    to: Literal["same", "prompt_completion", "alpaca", "messages", "sharegpt"] = setting(
        "same", "the shape: {prompt, completion}, {instruction, input, output}, {messages} or {conversations}"
    )
    keep_fields: bool = setting(False, "keep the fields that are not part of the old shape, such as id and task")


SETTINGS: dict[str, type] = {
    "convert": Convert,
}
