"""`jax-it data convert`: records in another shape."""

from functools import partial

from jax_it.curation.input import Input
from jax_it.curation.settings import Convert
from jax_it.curation.stage import Kept, Outcome, PerRecord, Plan
from jax_it.data import templates
from jax_it.data.records import Fields, InvalidRecord, Record
from jax_it.data.templates import Example

# The fields of the shapes that are read without a template of Jinja text.
OF_SHAPES = {
    "prompt", "completion", "instruction", "input", "output", "messages", "conversations", "Definition",
    "Positive Examples",
}  # fmt: skip


def plan(settings: Convert, input: Input) -> Plan:
    return Plan(PerRecord(partial(_convert, settings)))


def _convert(settings: Convert, record: Record, template: str) -> Outcome:
    if settings.to == "same":
        return Kept(record.fields)
    example = templates.render(record, template)
    fields = _SHAPES[settings.to](example, record)
    if settings.keep_fields:
        fields = {name: value for name, value in record.fields.items() if name not in OF_SHAPES} | fields
    return Kept(fields, (f"to {settings.to}",))


def _prompt_completion(example: Example, record: Record) -> Fields:
    references = list(example.references)
    return {
        "prompt": _single_prompt(example, record),
        "completion": references if len(references) > 1 else references[0],
    }


def _alpaca(example: Example, record: Record) -> Fields:
    """Return {instruction, input, output}; the parts of an Alpaca record stay apart."""
    if "instruction" in record.fields and isinstance(record.fields.get("output"), str):
        return {"instruction": example.prompt, "input": "", "output": example.completion} | {
            name: record.fields[name] or "" for name in ("instruction", "input", "output") if name in record.fields
        }
    return {"instruction": _single_prompt(example, record), "input": "", "output": example.completion}


def _single_prompt(example: Example, record: Record) -> str:
    if len(example.turns) > 2:
        raise InvalidRecord(
            f"{record.where}: a conversation of {len(example.turns)} messages is not one prompt and its completion; "
            "convert it to messages or sharegpt"
        )
    return example.prompt


def _messages(example: Example, record: Record) -> Fields:
    return {"messages": [{"role": turn.role, "content": turn.text} for turn in example.turns]}


_SHAREGPT_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}


def _sharegpt(example: Example, record: Record) -> Fields:
    return {"conversations": [{"from": _SHAREGPT_ROLES[turn.role], "value": turn.text} for turn in example.turns]}


_SHAPES = {
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "messages": _messages,
    "sharegpt": _sharegpt,
}
