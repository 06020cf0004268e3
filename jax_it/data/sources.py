"""Data sets of every supported kind, as a stream of records: plain dicts that know where they stand."""

import csv
import gzip
import hashlib
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jax_it import files
from jax_it.config import Source
from jax_it.data import builtin
from jax_it.errors import UserError, first_line

Fields = dict[str, Any]

_BUILTIN = "builtin:instructions"


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
        count += 1
        yield record
        if count == source.limit:
            return
    if not count:
        raise UserError(f"{source.path} holds no records; remove it from {where} or give it some")


def digest(source: Source, where: str = "config.data") -> str:
    """A hash of everything that decides what `read` yields."""
    kind = _kind(source, where)
    parts = hashlib.blake2b(digest_size=16)
    parts.update(repr((kind, source.limit, *filter(None, (source.records, source.limit_each)))).encode())
    if kind == "datasets":
        parts.update(_load_dataset(source, where)._fingerprint.encode())
    elif kind == "builtin":
        parts.update(repr((source.path, source.split)).encode())
    else:
        for file in _files(source, where):
            # Commas and tabs are told apart by the ending, and tasks by the name.
            parts.update((file.name if source.records else _suffix(file)).encode())
            try:
                with file.open("rb") as stream:
                    parts.update(hashlib.file_digest(stream, "blake2b").digest())
            except OSError as error:
                raise UserError(f"{where}: {file} cannot be read: {error.strerror}") from error
    return parts.hexdigest()


def _read_all(source: Source, where: str) -> Iterator[Record]:
    kind = _kind(source, where)
    if kind == "builtin":
        if source.path != _BUILTIN:
            raise UserError(f"{where}: there is no built-in data set {source.path}; the one there is is {_BUILTIN}")
        for i, fields in enumerate(builtin.records(source.split)):
            yield Record(fields, f"{source.path}, record {i + 1}")
    elif kind == "datasets":
        for i, fields in enumerate(_load_dataset(source, where)):
            yield Record(fields, f"{source.path} ({source.split}), row {i + 1}")
    else:
        if source.records and kind != "json":
            raise UserError(f"{where}.records is for JSON files, not for {kind}; leave it out")
        for file in _files(source, where):
            records = _read_object(file, source.records) if source.records else _READERS[kind](file)
            yield from itertools.islice(records, source.limit_each or None)


def _kind(source: Source, where: str) -> str:
    if source.format != "auto":
        return source.format
    if source.path.startswith("builtin:"):
        return "builtin"
    path = files.locate(source.path).expanduser()
    if not path.exists() and not files.matches(path):
        if _suffix(path) in _SUFFIXES or source.path.startswith((".", "/", "~")) or files.is_remote(path):
            raise UserError(f"{where}: data file {source.path} does not exist")
        if path.suffix:
            raise UserError(
                f"{where}: data file {source.path} does not exist; if it is a data set of the hub, set its "
                "format to 'datasets'"
            )
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
    path = files.locate(source.path).expanduser()
    if source.listed:
        return _listed(path, source.listed, where)
    if path.is_dir():
        kinds = set(_SUFFIXES.values()) if source.format == "auto" else {source.format}
        found = sorted(file for file in path.iterdir() if _SUFFIXES.get(_suffix(file)) in kinds)
    else:
        found = [path] if path.is_file() else files.matches(path)
    if not found:
        raise UserError(f"{where}: no data file matches {source.path}")
    return found


def _listed(folder: Path, names: str, where: str) -> list[Path]:
    """The files of a folder that a text file names, a line each, without their ending."""
    try:
        lines = files.locate(names).expanduser().read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}.listed: {names} cannot be read: {error}") from None
    found = []
    for line in lines:
        there = [folder / f"{line}{suffix}{packed}" for suffix in _SUFFIXES for packed in ("", ".gz", ".zst")]
        file = next((file for file in there if file.is_file()), None)
        if file is None:
            raise UserError(f"{where}.listed: {names} names {line!r}, and {folder} has no such data file")
        found.append(file)
    return found


def _load_dataset(source: Source, where: str) -> Any:
    import datasets  # slow to import, and needed for this format alone

    try:
        return datasets.load_dataset(source.path, source.subset or None, split=source.split)
    except Exception as error:  # the library raises dozens of types for one thing: there is no such data set
        reason = first_line(error)
        raise UserError(
            f"{where}: data set {source.path!r} (subset {source.subset!r}, split {source.split!r}) "
            f"could not be loaded: {reason}"
        ) from error


def _open(file: Path) -> gzip.GzipFile | io.BufferedReader:
    """A file's bytes, unpacked on the fly where its name says so."""
    if file.suffix == ".gz":
        return gzip.open(file.open("rb") if files.is_remote(file) else file, "rb")
    if file.suffix == ".zst":
        return io.BufferedReader(_Chunks(_unzstd(file)), 1 << 17)
    return file.open("rb")


def _unzstd(file: Path) -> Iterator[bytes]:
    """A .zst file unpacked. zstandard's own reader takes a truncated file for a whole one."""
    import zstandard

    unpacker: Any = None  # of the frame that is being read; a file may hold several
    packed = b""
    with file.open("rb") as stream:
        while packed or (packed := stream.read(1 << 17)):
            unpacker = unpacker or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield unpacker.decompress(packed)
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            packed = unpacker.unused_data
            if unpacker.eof:
                unpacker = None
    if unpacker is not None:
        raise EOFError("Compressed file ended before the end of its last frame")


class _Chunks(io.RawIOBase):
    """A stream of the bytes that an iterator yields."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks = chunks
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            if (chunk := next(self._chunks, None)) is None:
                return 0
            self._left = memoryview(chunk)
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


def _read_text(file: Path, parse: Callable[[io.TextIOBase], Iterator[Record]]) -> Iterator[Record]:
    try:
        # With or without the byte order mark that Excel writes.
        with _open(file) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
            yield from parse(text)
    except UnicodeDecodeError:
        raise UserError(f"{file}, line {_undecodable(file)}: not UTF-8 text; convert the file to UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be read: {error}; restore or remove the file") from error


def _undecodable(file: Path) -> int:
    """The first line that is not UTF-8."""
    with _open(file) as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 0  # the file has changed meanwhile


def _read_json(file: Path) -> Iterator[Record]:
    """JSON lines, or one JSON list of records."""

    def parse(stream: io.TextIOBase) -> Iterator[Record]:
        first = True
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            if first and line.lstrip().startswith("["):
                yield from _read_json_list(file, "\n" * (number - 1) + line + stream.read())
                return
            first = False
            yield _record(_parse_json(line, f"{file}, line {number}"), f"{file}, line {number}")

    return _read_text(file, parse)


def _read_json_list(file: Path, text: str) -> Iterator[Record]:
    try:
        records = json.loads(text)
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON: {error}; mend the file") from None
    for i, fields in enumerate(records, 1):
        yield _record(fields, f"{file}, record {i}")


def _read_object(file: Path, field: str) -> Iterator[Record]:
    """The records that one JSON object holds in a list; each gets its other fields, and the file's name as `task`."""

    def parse(stream: io.TextIOBase) -> Iterator[Record]:
        whole = _record(_parse_json(stream.read(), str(file)), str(file)).fields
        if not isinstance(whole.get(field), list):
            raise UserError(f"{file}: no list of records in the field {field!r}; its fields: {', '.join(whole)}")
        shared = {"task": _stem(file)} | {name: value for name, value in whole.items() if name != field}
        for i, fields in enumerate(whole[field], 1):
            where = f"{file}, {field} {i}"
            yield Record(shared | _record(fields, where).fields, where)

    return _read_text(file, parse)


def _stem(file: Path) -> str:
    return file.name.removesuffix(file.suffix if file.suffix in (".gz", ".zst") else "").rpartition(".")[0]


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
            where = f"{file}, line {reader.line_num + 1}"  # line_num is where the last whole record ended
            raise UserError(f"{where}: not valid CSV ({error}); mend the line") from None

    return _read_text(file, parse)


def _read_parquet(file: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with file.open("rb") as stream:
            for batch in pyarrow.parquet.ParquetFile(stream).iter_batches():
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
