"""What a stage decides on each record while it plans, kept in files until the records are written."""

import pickle
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_it.curation.input import Chunk, Input
from jax_it.curation.stage import Outcome, invalid
from jax_it.data.records import InvalidRecord, Record


@dataclass(frozen=True)
class Planned:
    """Treats records one by one with a function of the record, its template, and what was decided on it.

    `put` keeps the decisions on a chunk that begins at a record's number, one for each of its records.
    """

    function: Callable[[Record, str, Any], Outcome]
    folder: Path

    def put(self, start: int, decisions: Sequence[Any]) -> None:
        (self.folder / str(start)).write_bytes(pickle.dumps(list(decisions)))

    def __call__(self, chunk: Chunk) -> list[Outcome]:
        decisions = pickle.loads((self.folder / str(chunk.start)).read_bytes())
        return [self._one(record, chunk.template, one) for record, one in zip(chunk.records(), decisions, strict=True)]

    def _one(self, record: Record, template: str, decision: Any) -> Outcome:
        if record.error:
            return invalid(record.error)
        try:
            return self.function(record, template, decision)
        except InvalidRecord as error:
            return invalid(error)


def planned(function: Callable[[Record, str, Any], Outcome], input: Input) -> Planned:
    """Return a `Planned` with a folder of its own for its files."""
    return Planned(function, Path(tempfile.mkdtemp(dir=input.folder)))
