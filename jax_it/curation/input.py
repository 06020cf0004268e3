"""The records of data sets in chunks, which can be sent to other processes before they are parsed."""

import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from etils import epath

from jax_it.config import Source
from jax_it.data import records, sources
from jax_it.data.records import Record
from jax_it.errors import UserError
from jax_it.workers import Workers

T = TypeVar("T")
CHUNK_RECORDS = 512
CHUNK_CHARACTERS = 1 << 20
ORIGIN = "jax_it origin"  # the field of a recipe's intermediate files that says where a record was read at first


@dataclass(frozen=True)
class Chunk:
    """Records that follow each other: of a file of JSON lines its text, of other data the records themselves."""

    start: int  # the number of the first record among all of the input, from 0
    size: int  # records
    template: str  # that renders them
    file: str = ""
    first_line: int = 0  # the number of the first line of `text` in the file, from 1
    text: str = ""  # with a lone surrogate for each byte that is not UTF-8
    parsed: tuple[Record, ...] = ()
    origins: bool = False  # of a recipe's intermediate file: records say where they were read at first
    note: Any = None  # what a stage's `lookup` found for these records

    def records(self) -> Iterator[Record]:
        """Yield the records; those that cannot be read have an `error`."""
        found = iter(self.parsed) if self.parsed else self._lines()
        return map(_original, found) if self.origins else found

    def _lines(self) -> Iterator[Record]:
        for number, line in enumerate(io.StringIO(self.text, newline=""), self.first_line):
            if line.strip():
                yield _read_line(line, f"{self.file}, line {number}")


def _read_line(line: str, where: str) -> Record:
    if not line.isascii():
        try:
            line.encode()
        except UnicodeEncodeError:
            return Record({}, where, f"{where}: not UTF-8 text; convert the file to UTF-8")
    return records.read_line(line, where)


def _original(record: Record) -> Record:
    """Return a record of a recipe's intermediate file with the place that it was read at first."""
    fields = dict(record.fields)
    return Record(fields, fields.pop(ORIGIN))


def location(where: str) -> dict[str, str | int]:
    """Return {"file": "data.jsonl", "line": 7} of "data.jsonl, line 7"; "row" of tables, "record" of JSON lists."""
    file, _, place = where.rpartition(", ")
    kind, _, number = place.rpartition(" ")
    return {"file": file, kind if kind in ("line", "row") else "record": int(number)}


@dataclass(frozen=True)
class Input:
    """What a stage reads: all records of some data sets, as often as it needs them."""

    sources: tuple[Source, ...]
    where: str  # what names the data sets in messages
    workers: Workers
    folder: Path  # for what a stage keeps on disk while it runs
    origins: bool = False  # the data set is a recipe's intermediate file

    def chunks(self) -> Iterator[Chunk]:
        """Yield all records in chunks, which are the same however many workers there are."""
        start = 0
        for number, source in enumerate(self.sources):
            where = f"{self.where}.{number}" if self.where.startswith("config") else self.where
            for chunk in _chunks(source, where, start):
                start += chunk.size
                yield replace(chunk, origins=self.origins)

    def map(self, function: Callable[[Chunk], T], lookup: Callable[[Chunk], Any] | None = None) -> Iterator[T]:
        """Yield the function's result for each chunk, in order. It runs on the workers: it must be picklable.

        `lookup` runs in this process; its result is the chunk's `note`.
        """
        chunks = self.chunks()
        if lookup is not None:
            chunks = (replace(chunk, note=lookup(chunk)) for chunk in chunks)
        return self.workers.map(function, chunks)

    def describe(self) -> list[dict[str, str]]:
        """Return of each data set its path, its template and a hash of its content."""
        return [
            {"path": source.path, "template": source.template[0], "digest": sources.digest(source, self.where)}
            for source in self.sources
        ]


def _chunks(source: Source, where: str, start: int) -> Iterator[Chunk]:
    if len(source.template) != 1:
        raise UserError(f"{where}.template: {len(source.template)} templates; the data tools take one")
    template = source.template[0]
    files = sources.line_files(source, where)
    if files is None:
        yield from _of_records(sources.read(source, where, keep_invalid=True), template, start)
        return
    first = start
    for file in files:
        for chunk in _of_file(file, template, start):
            start += chunk.size
            yield chunk
    if start == first:
        raise UserError(f"{source.path} holds no records; leave it out or add some")


def _of_file(file: epath.Path, template: str, start: int) -> Iterator[Chunk]:
    if _is_list(file):
        yield from _of_records(records.read_json(file), template, start)
        return
    with records.open_text(file, errors="surrogateescape") as stream:
        size = characters = 0
        first_line, lines = 1, []
        for number, line in enumerate(records.lines_of(stream, file), 1):
            lines.append(line)
            size += bool(line.strip())
            characters += len(line)
            if size == CHUNK_RECORDS or characters > CHUNK_CHARACTERS:
                yield Chunk(start, size, template, str(file), first_line, "".join(lines))
                start, size, characters, first_line, lines = start + size, 0, 0, number + 1, []
        if size:
            yield Chunk(start, size, template, str(file), first_line, "".join(lines))


def _is_list(file: epath.Path) -> bool:
    """Return whether a JSON file holds one list, and not a record in each line."""
    with records.open_text(file, errors="surrogateescape") as stream:
        first = next((line for line in records.lines_of(stream, file) if line.strip()), "")
    return first.lstrip().startswith("[")


def _of_records(found: Iterable[Record], template: str, start: int) -> Iterator[Chunk]:
    items = iter(found)
    while parsed := tuple(itertools.islice(items, CHUNK_RECORDS)):
        yield Chunk(start, len(parsed), template, parsed=parsed)
        start += len(parsed)


def sources_of(paths: Sequence[str], template: str) -> tuple[Source, ...]:
    """Return the data sets that a command line names."""
    settings: Any = {"template": (template,)}
    return tuple(Source(path=path, **settings) for path in paths)
