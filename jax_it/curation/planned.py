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


class Decisions:
    """A decision on each record: a `Plan`'s `lookup`."""

    def __init__(self, input: Input):
        self._folder = Path(tempfile.mkdtemp(dir=input.folder))

    def put(self, start: int, decisions: Sequence[Any]) -> None:
        """Keep those on a chunk that begins with record number `start`, one for each of its records."""
        (self._folder / str(start)).write_bytes(pickle.dumps(list(decisions)))

    def __call__(self, chunk: Chunk) -> list[Any]:
        found: list[Any] = pickle.loads((self._folder / str(chunk.start)).read_bytes())
        return found


@dataclass(frozen=True)
class PerDecision:
    """Treats records one by one with a function of the record, its template, and the decision on it: the chunk's note.

    The function may raise InvalidRecord.
    """

    function: Callable[[Record, str, Any], Outcome]

    def __call__(self, chunk: Chunk) -> list[Outcome]:
        return [self._one(record, chunk.template, one) for record, one in zip(chunk.records(), chunk.note, strict=True)]

    def _one(self, record: Record, template: str, decision: Any) -> Outcome:
        if record.error:
            return invalid(record.error)
        try:
            return self.function(record, template, decision)
        except InvalidRecord as error:
            return invalid(error)
