"""Data sets of every supported kind as a stream of records: dicts, each with its file and line."""

import csv
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from jax_it import files
from jax_it.config import Source
from jax_it.data import builtin
from jax_it.errors import UserError, first_line

Fields = dict[str, Any]

_BUILTIN = "builtin:instructions"
_LONGEST = 1 << 26  # characters of a line: a small archive can unpack to one line that fills the memory
_LONGEST_LIST = 1 << 30  # characters of a JSON list or object, which is parsed as a whole
_COMMIT = re.compile("[0-9a-f]{40}")


class Record(NamedTuple):
    fields: Fields
    where: str  # "data/train.jsonl, line 7", for messages
    error: str = ""  # why the record cannot be read; it has no fields then


class InvalidRecord(UserError):
    """Raised for a fault of one record, which `config.data.on_invalid` may leave out."""


def name_of(source: Source) -> str:
    """Return the name of a data set in reports."""
    return source.name or Path(source.path).name.split(".")[0] or source.path


def read(source: Source, where: str = "config.data", keep_invalid: bool = False) -> Iterator[Record]:
    """Yield the records of a data set, in order.

    Raises UserError that names the file and the line; with `keep_invalid`, a single record at fault is yielded with
    its `error` instead.
    """
    count = 0
    for record in _read_all(source, where):
        if record.error and not keep_invalid:
            raise InvalidRecord(record.error)
        count += 1
        yield record
        if count == source.limit:
            return
    if not count:
        raise UserError(f"{source.path} holds no records; remove it from {where} or give it some")


def digest(source: Source, where: str = "config.data") -> str:
    """Return a hash of everything that decides what `read` yields."""
    kind = _kind(source, where)
    _check_settings(source, kind, where)
    parts = hashlib.blake2b(digest_size=16)
    parts.update(repr((kind, source.limit, *filter(None, (source.records, source.max_per_file)))).encode())
    if kind == "datasets":
        parts.update(_load_dataset(source, where)._fingerprint.encode())
    elif kind == "builtin":
        parts.update(repr((source.path, source.split)).encode())
    else:
        for file in _files(source, where):
            # Commas and tabs are told apart by the ending, and tasks by the name.
            parts.update((file.name if source.records else _suffix(file)).encode())
            try:
                with files.open_binary(file) as stream:
                    parts.update(hashlib.file_digest(stream, "blake2b").digest())
            except OSError as error:
                raise UserError(f"{where}: {file} cannot be read: {error.strerror}") from error
    return parts.hexdigest()


def commit(source: Source, where: str = "config.data") -> str:
    """Return the commit that a hub data set's revision refers to now; "" for other data, and offline."""
    if _kind(source, where) != "datasets" or Path(source.path).is_dir() or _COMMIT.fullmatch(source.revision):
        return ""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return ""
    try:
        return huggingface_hub.HfApi().dataset_info(source.path, revision=source.revision or None).sha or ""
    except Exception as error:  # of a dozen types: it is not there, not for this user, or not to be reached
        raise _not_loaded(source, where, error) from error


def _read_all(source: Source, where: str) -> Iterator[Record]:
    kind = _kind(source, where)
    _check_settings(source, kind, where)
    if kind == "builtin":
        if source.path != _BUILTIN:
            raise UserError(f"{where}: there is no built-in data set {source.path}; the one there is is {_BUILTIN}")
        for i, fields in enumerate(builtin.records(source.split)):
            yield Record(fields, f"{source.path}, record {i + 1}")
    elif kind == "datasets":
        for i, fields in enumerate(_load_dataset(source, where)):
            yield Record(fields, f"{source.path} ({source.split}), row {i + 1}")
    else:
        for file in _files(source, where):
            records = _read_object(file, source.records) if source.records else _READERS[kind](file)
            yield from itertools.islice(records, source.max_per_file or None)


def _kind(source: Source, where: str) -> str:
    if source.format != "auto":
        return source.format
    if source.path.startswith("builtin:"):
        return "builtin"
    path = files.locate(source.path, f"{where}.path")
    if not path.exists() and not files.matches(path):
        if _suffix(path) in _SUFFIXES or source.path.startswith(".") or path.is_absolute():
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


_READ_BY = {  # settings that not every kind of source reads
    "records": ("json",), "file_list": ("json", "csv", "parquet"), "max_per_file": ("json", "csv", "parquet"),
    "subset": ("datasets",), "revision": ("datasets",), "split": ("datasets", "builtin"),
}  # fmt: skip


def _check_settings(source: Source, kind: str, where: str) -> None:
    """Refuses settings that nothing would read, and a name that cannot be printed."""
    if not source.name.isprintable():
        raise UserError(f"{where}.name: {source.name!r} has characters that cannot be printed; choose another")
    for name, kinds in _READ_BY.items():
        if kind not in kinds and getattr(source, name) != getattr(Source(), name):
            what = {"datasets": "hub data sets", "builtin": "the built-in data set"}
            known = " and ".join(what.get(kind, f"{kind} files") for kind in kinds)
            raise UserError(f"{where}.{name} is for {known}, not for {what.get(kind, f'{kind} files')}; leave it out")


def _suffix(file: epath.Path) -> str:
    return Path(file.stem).suffix if file.suffix in (".gz", ".zst") else file.suffix


def _files(source: Source, where: str) -> list[epath.Path]:
    path = files.locate(source.path, f"{where}.path")
    if source.file_list:
        return _listed(path, source.file_list, where)
    if not path.exists():
        found = files.matches(path)
    elif path.is_dir():
        kinds = set(_SUFFIXES.values()) if source.format == "auto" else {source.format}
        try:
            found = sorted(file for file in path.iterdir() if _SUFFIXES.get(_suffix(file)) in kinds)
        except OSError as error:
            raise UserError(f"{where}: the folder {path} cannot be read: {error.strerror}") from error
        if not found:
            raise UserError(f"{where}: the folder {source.path} holds no data files ({', '.join(_SUFFIXES)})")
    else:
        found = [path]
    if not found:
        raise UserError(f"{where}: no data file matches {source.path}")
    for file in found:
        if not files.is_regular(file):
            raise UserError(f"{where}: {file} is {_what(file)}, not a regular file, which can be read again")
    return found


def read_text(name: str, where: str) -> str:
    """A text file's content. Raises UserError that begins with `where`."""
    file = files.locate(name, where)
    try:
        if file.exists() and not files.is_regular(file):
            raise OSError(f"it is {_what(file)}")
        text: str = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: {name} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return text


def _what(file: epath.Path) -> str:
    """What stands in a data file's place."""
    if file.is_dir():
        return "a folder"
    if not file.exists():
        return "a broken link"
    return "a pipe" if stat.S_ISFIFO(os.stat(file).st_mode) else "a device or socket"


def _listed(folder: epath.Path, names: str, where: str) -> list[epath.Path]:
    """The files of a folder that a text file names, a line each, without their ending."""
    lines = read_text(names, f"{where}.file_list").split()
    if not lines:
        raise UserError(f"{where}.file_list: {names} names no file; give each a line")
    found = []
    for line in lines:
        there = [folder / f"{line}{suffix}{packed}" for suffix in _SUFFIXES for packed in ("", ".gz", ".zst")]
        file = next((file for file in there if files.is_regular(file)), None)
        if file is None:
            raise UserError(f"{where}.file_list: {names} names {line!r}, and {folder} has no such data file")
        found.append(file)
    return found


def _load_dataset(source: Source, where: str) -> Any:
    import datasets  # slow to import, and needed for this format alone

    try:
        found = datasets.load_dataset(
            source.path, source.subset or None, split=source.split, revision=source.revision or None
        )
    except Exception as error:  # the library raises dozens of types for one thing: there is no such data set
        raise _not_loaded(source, where, error) from error
    # Where the hub cannot be reached, the library takes whatever revision it has downloaded before.
    commits = set(re.findall(f"@({_COMMIT.pattern})/", " ".join(found.info.download_checksums or ())))
    if _COMMIT.fullmatch(source.revision) and commits - {source.revision}:
        raise UserError(
            f"{where}: revision {source.revision} of data set {source.path!r} cannot be downloaded, and what was "
            f"downloaded before is revision {', '.join(sorted(commits))}; try again with a connection to the hub"
        )
    return found


def _not_loaded(source: Source, where: str, error: Exception) -> UserError:
    revision = f", revision {source.revision!r}" if source.revision else ""
    return UserError(
        f"{where}: data set {source.path!r} (subset {source.subset!r}, split {source.split!r}{revision}) "
        f"could not be loaded: {first_line(error)}"
    )


@contextmanager
def _open(file: epath.Path) -> Iterator[Any]:
    """Yields a stream of a file's bytes, unpacked on the fly where its name says so."""
    with files.open_binary(file) as stream:
        if file.suffix == ".gz":
            yield gzip.GzipFile(fileobj=stream)
        elif file.suffix == ".zst":
            yield io.BufferedReader(_Chunks(_unzstd(stream)), 1 << 17)
        else:
            yield stream


def _unzstd(stream: io.BufferedIOBase) -> Iterator[bytes]:
    """Unpacks a .zst file. zstandard's own reader takes a truncated file for a whole one."""
    import zstandard

    unpacker: Any = None  # of the frame that is being read; a file may hold several
    packed = b""
    while packed or (packed := stream.read(1 << 10)):  # which may unpack to 32,000 times as much
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


def _read_text(file: epath.Path, parse: Callable[[io.TextIOBase], Iterator[Record]]) -> Iterator[Record]:
    try:
        # With or without the byte order mark that Excel writes.
        with _open(file) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
            yield from parse(text)
    except UnicodeDecodeError:
        raise UserError(f"{file}, line {_undecodable(file)}: not UTF-8 text; convert the file to UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be read: {error}; restore or remove the file") from error


def _undecodable(file: epath.Path) -> int:
    """The first line that is not UTF-8."""
    number = 0
    try:
        with _open(file) as stream:
            while line := stream.readline(_LONGEST):
                number += 1
                line.decode()
    except (UnicodeDecodeError, OSError, EOFError, zlib.error):  # an archive may be damaged as well
        pass
    return number


def _lines(stream: io.TextIOBase, file: epath.Path) -> Iterator[str]:
    """The lines of a file. Raises UserError for one so long that it is none."""
    number = 0
    while line := stream.readline(_LONGEST):
        number += 1
        if len(line) == _LONGEST:
            raise UserError(f"{file}, line {number}: a line of more than {_LONGEST} characters; split the file's lines")
        yield line


def _whole(stream: io.TextIOBase, file: epath.Path) -> str:
    text = stream.read(_LONGEST_LIST)
    if len(text) == _LONGEST_LIST:
        raise UserError(f"{file}: more than {_LONGEST_LIST} characters in one JSON value; write a record on each line")
    return text


def _read_json(file: epath.Path) -> Iterator[Record]:
    """JSON lines, or one JSON list of records."""

    def parse(stream: io.TextIOBase) -> Iterator[Record]:
        first = True
        for number, line in enumerate(_lines(stream, file), 1):
            if not line.strip():
                continue
            if first and line.lstrip().startswith("["):
                yield from _read_json_list(file, "\n" * (number - 1) + line + _whole(stream, file))
                return
            first = False
            where = f"{file}, line {number}"
            try:
                record = _record(_JSON.decode(line), where)
            except (ValueError, RecursionError) as error:
                record = Record({}, where, str(_malformed(error, where, "line")))
            yield record

    return _read_text(file, parse)


def _read_json_list(file: epath.Path, text: str) -> Iterator[Record]:
    """The records of a JSON list, one after another."""
    number, at = 0, _blanks(text, text.index("[") + 1)
    closed = text[at : at + 1] == "]"
    while not closed:
        number += 1
        where = f"{file}, record {number}"
        try:
            fields, at = _JSON.raw_decode(text, at)
            at = _blanks(text, at)
            if text[at : at + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        except (ValueError, RecursionError) as error:
            raise _malformed(error, where, "record" if isinstance(error, _Repeated) else "file") from None
        yield _record(fields, where)
        closed = text[at] == "]"
        at = _blanks(text, at + 1) if not closed else at
    if (rest := _blanks(text, at + 1)) < len(text):
        raise _malformed(json.JSONDecodeError("Extra data", text, rest), str(file), "file")


def _blanks(text: str, at: int) -> int:
    """Where the blanks from `at` on end."""
    match = _BLANKS.match(text, at)
    assert match
    return match.end()


def _read_object(file: epath.Path, field: str) -> Iterator[Record]:
    """The records that one JSON object holds in a list; each gets its other fields, and the file's name as `task`."""

    def parse(stream: io.TextIOBase) -> Iterator[Record]:
        try:
            whole = _JSON.decode(_whole(stream, file))
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
                raise UserError(
                    f"{file}: `records` is for a file that holds one JSON object, and this one continues after it, in "
                    f"line {error.lineno}; leave it out for JSON lines"
                ) from None
            raise _malformed(error, str(file), "file") from None
        if not isinstance(whole, dict):
            raise UserError(f"{file}: expected an object with fields, got {type(whole).__name__}")
        if not isinstance(whole.get(field), list):
            raise UserError(f"{file}: no list of records in the field {field!r}; its fields: {shown(whole)}")
        shared = {"task": _stem(file)} | {name: value for name, value in whole.items() if name != field}
        for i, fields in enumerate(whole[field], 1):
            record = _record(fields, f"{file}, {field} {i}")
            yield record._replace(fields=shared | record.fields)

    return _read_text(file, parse)


def _stem(file: epath.Path) -> str:
    return file.name.removesuffix(file.suffix if file.suffix in (".gz", ".zst") else "").rpartition(".")[0]


class _Repeated(ValueError):
    """Raised for an object that has a key twice."""


def _object(pairs: list[tuple[str, Any]]) -> Fields:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Repeated(_repeated([key for key, _ in pairs]))
    return found


def _repeated(names: Sequence[str]) -> str:
    return shown(repr(name) for name, number in Counter(names).items() if number > 1)


def shown(names: Iterable[Any], most: int = 20, length: int = 60) -> str:
    """Names in a message, of which there may be any number of any length."""
    texts = [str(name) for name in names]
    texts = [text if len(text) <= length else f"{text[: length - 3]}..." for text in texts]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


_JSON = json.JSONDecoder(object_pairs_hook=_object)
_BLANKS = re.compile(r"[ \t\n\r]*")


def _malformed(error: Exception, where: str, what: str) -> UserError:
    if isinstance(error, _Repeated):
        return UserError(f"{where}: an object has the key {error} more than once; keep one of them")
    reason = "nested too deeply" if isinstance(error, RecursionError) else error
    return UserError(f"{where}: not valid JSON ({reason}); fix or remove the {what}")


def _record(fields: Any, where: str) -> Record:
    if not isinstance(fields, dict):
        return Record({}, where, f"{where}: expected an object with fields, got {type(fields).__name__}")
    return Record(fields, where)


def _read_csv(file: epath.Path) -> Iterator[Record]:
    """CSV, or tab-separated where the name ends in .tsv; the first line names the fields."""

    def parse(stream: io.TextIOBase) -> Iterator[Record]:
        csv.field_size_limit(_LONGEST)
        delimiter = "\t" if _suffix(file) == ".tsv" else ","
        reader = csv.DictReader(_lines(stream, file), delimiter=delimiter, strict=True)
        try:
            names = reader.fieldnames or ()
            if len(set(names)) < len(names):
                raise UserError(f"{file}, line 1: columns have the same name: {_repeated(names)}; rename or remove one")
            for fields in reader:
                where = f"{file}, line {reader.line_num}"
                if None in fields or None in fields.values():
                    yield Record({}, where, f"{where}: expected {len(names)} columns; fix the line")
                else:
                    yield Record(fields, where)
        except csv.Error as error:
            where = f"{file}, line {reader.line_num + 1}"  # line_num is where the last whole record ended
            raise UserError(f"{where}: not valid CSV ({error}); fix the line") from None

    return _read_text(file, parse)


def _read_parquet(file: epath.Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with file.open("rb") as stream:
            table = pyarrow.parquet.ParquetFile(stream)
            names = table.schema_arrow.names
            if len(set(names)) < len(names):
                raise UserError(f"{file}: columns have the same name: {_repeated(names)}; rename or remove one")
            for batch in table.iter_batches():
                try:
                    records = [Record(fields, "") for fields in batch.to_pylist()]
                except (ValueError, OverflowError, LookupError):  # also of zoneinfo, for a time zone
                    records = [_read_row(batch, number) for number in range(batch.num_rows)]
                for record in records:
                    row += 1
                    where = f"{file}, row {row}"
                    yield Record(record.fields, where, record.error and f"{where}, {record.error}")
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read after row {row}: {first_line(error)}") from error


def _read_row(batch: Any, number: int) -> Record:
    """Read a row of a batch in which some value has no counterpart in Python."""
    fields = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            fields[name] = column[number].as_py()
        except Exception as error:  # as to_pylist raises
            reason = f"{type(error).__name__}: {first_line(error)}"
            return Record({}, "", f"column {name!r} cannot be read: {reason}; fix or remove it")
    return Record(fields, "")


_READERS: dict[str, Callable[[epath.Path], Iterator[Record]]] = {
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
}
_SUFFIXES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
