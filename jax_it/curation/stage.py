"""What a stage is: `plan(settings, input) -> Plan`, a function that treats each chunk of records.

The smallest stage is a function of one record:

    def plan(settings: settings.Shorter, input: Input) -> Plan:
        return Plan(PerRecord(partial(_shorter, settings)))

    def _shorter(settings: settings.Shorter, record: Record, template: str) -> Outcome:
        example = templates.render(record, template)
        if len(example.completion) > settings.most:
            return Dropped("too long", {"characters": len(example.completion)})
        return Kept(record.fields)

One that must see all records before it decides, as deduplication, reads them in `plan` (`input.map`; files in
`input.folder` take what does not fit into memory), and returns besides `apply` a `lookup` of what it decided.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

from jax_it.curation.input import Chunk, Input
from jax_it.data.records import Fields, InvalidRecord, Record
from jax_it.errors import UserError


class Kept(NamedTuple):
    fields: Fields
    changes: tuple[str, ...] = ()  # the kinds of change that were made to the record; each is counted in the manifest


class Dropped(NamedTuple):
    reason: str  # in few words, the same for many records: they are counted by it
    details: Mapping[str, Any] = {}  # further keys of the record's line in the list of dropped records


Outcome = Kept | Dropped
INVALID = "invalid"  # the reason of records that cannot be read or rendered


def invalid(error: InvalidRecord | str) -> Dropped:
    return Dropped(INVALID, {"error": str(error)})


class Plan(NamedTuple):
    """How a stage treats its records."""

    # Returns one outcome for each record of a chunk, in order; sent to other processes, so it can be pickled.
    apply: Callable[[Chunk], list[Outcome]]
    # Called here, in the main process, for each chunk; `apply` finds the result as the chunk's `note`.
    lookup: Callable[[Chunk], Any] | None = None
    report: Mapping[str, Any] = {}  # what was found in planning, for the manifest
    text: str = ""  # the same, to be printed
    records: Input | None = None  # those that a stage has made, which are written in place of the input's
    # Of a dropped record's line in the list the lines to be printed, where they are more than the reason.
    describe: Callable[[Fields], list[str]] | None = None


@dataclass(frozen=True)
class PerRecord:
    """Treats records one by one with a function of the record and the template that renders it.

    The function may raise InvalidRecord.
    """

    function: Callable[[Record, str], Outcome]

    def __call__(self, chunk: Chunk) -> list[Outcome]:
        return [self._one(record, chunk.template) for record in chunk.records()]

    def _one(self, record: Record, template: str) -> Outcome:
        if record.error:
            return invalid(record.error)
        try:
            return self.function(record, template)
        except InvalidRecord as error:
            return invalid(error)


def require(module: str, what: str) -> Any:
    """Import a module of the extra `data`. Raises UserError that says what needs it."""
    try:
        return import_module(module)
    except ImportError:
        raise UserError(f"{what} needs {module.split('.')[0]}: pip install 'jax-it[data]'") from None
