"""Data sets of every supported kind, as a stream of records: plain dicts that know where they stand."""

import csv
import glob
import gzip
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jax_it.config import Source
from jax_it.data import builtin
from jax_it.errors import UserError

Fields = dict[str, Any]


class Record(NamedTuple):
    fields: Fields
    where: str  # "data/train.jsonl, line 7", for messages


def name_of(source: Source) -> str:
    """The name of a data set in reports."""
    return source.name or Path(source.path).name.split(".")[0] or source.path


def read(source: Source, where: str = "config.data") -> Iterator[Record]:
    """The records of a data set, in order. Raises UserError that names the file and the line."""
    count = 0
    for record in _read_all(source, where):
        if source.limit and count == source.limit:
            return
        count += 1
        yield record
    if not count:
        raise UserError(f"{source.path} holds no records; remove it from {where} or give it some")


def digest(source: Source, where: str = "config.data") -> str:
    """A hash of everything that decides what `read` yields."""
    kind = _kind(source, where)
    parts = hashlib.blake2b(digest_size=16)
    parts.update(repr((kind, source.limit)).encode())
    if kind == "datasets":
        parts.update(_load_dataset(source, where)._fingerprint.encode())
    elif kind == "builtin":
        parts.update(repr((source.path, source.split)).encode())
    else:
        for file in _files(source, where):
            with file.open("rb") as stream:
                parts.update(hashlib.file_digest(stream, "blake2b").digest())
    return parts.hexdigest()


def _read_all(source: Source, where: str) -> Iterator[Record]:
    kind = _kind(source, where)
    if kind == "builtin":
        for i, fields in enumerate(builtin.records(source.split)):
            yield Record(fields, f"{source.path}, record {i + 1}")
    elif kind == "datasets":
        for i, fields in enumerate(_load_dataset(source, where)):
            yield Record(fields, f"{source.path} ({source.split}), row {i + 1}")
    else:
        for file in _files(source, where):
            yield from _READERS[kind](file)


def _kind(source: Source, where: str) -> str:
    if source.format != "auto":
        return source.format
    if source.path.startswith("builtin:"):
        return "builtin"
    path = Path(source.path)
    if not path.exists() and not glob.glob(source.path):
        if path.suffix or source.path.startswith((".", "/", "~")):
            raise UserError(f"{where}: data file {source.path} does not exist")
        return "datasets"
    kinds = {_SUFFIXES.get(_suffix(file), "") for file in _files(source, where)}
    if len(kinds) != 1 or "" in kinds:
        raise UserError(
            f"{where}: cannot tell the format of {source.path} by its name; use {', '.join(_SUFFIXES)} "
            "(.gz and .zst may follow), or set the source's format"
        )
    return kinds.pop()


def _suffix(file: Path) -> str:
    return Path(file.stem).suffix if file.suffix in (".gz", ".zst") else file.suffix


def _files(source: Source, where: str) -> list[Path]:
    path = Path(source.path)
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if _suffix(f) in _SUFFIXES)
    else:
        files = [path] if path.is_file() else sorted(Path(f) for f in glob.glob(source.path))
    if not files:
        raise UserError(f"{where}: no data file matches {source.path}")
    return files


def _load_dataset(source: Source, where: str) -> Any:
    import datasets  # slow to import, and needed for this format alone

    try:
        return datasets.load_dataset(source.path, source.subset or None, split=source.split)
    except Exception as error:  # the library raises dozens of types for one thing: there is no such data set
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{where}: data set {source.path!r} (subset {source.subset!r}, split {source.split!r}) "
            f"could not be loaded: {reason}"
        ) from error


def _open(file: Path) -> io.TextIOBase:
    """A text file, unpacked on the fly where its name says so; undecodable bytes are reported by the reader."""
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8", newline="")
    if file.suffix == ".zst":
        import zstandard

        return zstandard.open(file, "rt", encoding="utf-8", newline="")
    return file.open(encoding="utf-8", newline="")


def _read_text(file: Path, parse: Callable[[io.TextIOBase], Iterator[Record]]) -> Iterator[Record]:
    try:
        with _open(file) as stream:
            yield from parse(stream)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def _read_json(file: Path) -> Iterator[Record]:
    """JSON lines, or one JSON list of records."""

    def parse(stream: io.TextIOBase) -> Iterator[Record]:
        first = stream.read(1)
        while first.isspace():
            first = stream.read(1)
        stream.seek(0)
        if first == "[":
            yield from _read_json_list(file, stream)
            return
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield _record(_parse_json(line, f"{file}, line {number}"), f"{file}, line {number}")

    return _read_text(file, parse)


def _read_json_list(file: Path, stream: io.TextIOBase) -> Iterator[Record]:
    try:
        records = json.load(stream)
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON: {error}; mend the file") from None
    for i, fields in enumerate(records, 1):
        yield _record(fields, f"{file}, record {i}")


def _parse_json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}); mend or remove the line") from None


def _record(fields: Any, where: str) -> Record:
    if not isinstance(fields, dict):
        raise UserError(f"{where}: expected an object with fields, got {type(fields).__name__}")
    return Record(fields, where)


def _read_csv(file: Path) -> Iterator[Record]:
    """CSV, or tab-separated where the name ends in .tsv; the first line names the fields."""

    def parse(stream: io.TextIOBase) -> Iterator[Record]:
        csv.field_size_limit(2**31 - 1)
        reader = csv.DictReader(stream, delimiter="\t" if _suffix(file) == ".tsv" else ",", strict=True)
        try:
            for fields in reader:
                where = f"{file}, line {reader.line_num}"
                if None in fields or None in fields.values():
                    raise UserError(f"{where}: expected {len(reader.fieldnames or ())} columns; mend the line")
                yield Record(fields, where)
        except csv.Error as error:
            raise UserError(f"{file}, line {reader.line_num}: not valid CSV ({error}); mend the line") from None

    return _read_text(file, parse)


def _read_parquet(file: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            for fields in batch.to_pylist():
                row += 1
                yield Record(fields, f"{file}, row {row}")
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read after row {row}: {error}") from error


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
}
_SUFFIXES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
