"""Records from files: opened, unpacked, read as JSON lines, a list or an object; `tables.py` reads other formats."""

import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from jax_it import files
from jax_it.errors import UserError, shorten

Fields = dict[str, Any]
LONGEST_LINE = 1 << 26  # characters of a line: a small archive can unpack to one line that fills the memory
_LONGEST_LIST = 1 << 30  # characters of a JSON list or object, which is parsed as a whole
_BLANKS = re.compile(r"[ \t\n\r]*")


class Record(NamedTuple):
    fields: Fields
    where: str  # "data/train.jsonl, line 7", for messages
    error: str = ""  # why the record cannot be read; it has no fields then


class InvalidRecord(UserError):
    """Raised for a fault of one record, which `config.data.on_invalid` may leave out."""


def suffix_of(file: epath.Path) -> str:
    """Return the ending that tells the format."""
    return Path(file.stem).suffix if file.suffix in (".gz", ".zst") else file.suffix


@contextmanager
def open_file(file: epath.Path) -> Iterator[Any]:
    """Yield a stream of a file's bytes, unpacked on the fly where its name says so."""
    with files.open_binary(file) as stream:
        if file.suffix == ".gz":
            yield gzip.GzipFile(fileobj=stream)
        elif file.suffix == ".zst":
            yield io.BufferedReader(_Chunks(_unzstd(stream)), 1 << 17)
        else:
            yield stream


def _unzstd(stream: io.BufferedIOBase) -> Iterator[bytes]:
    """Unpack a .zst file. zstandard's own reader accepts a truncated file as complete."""
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


def read_text_file(file: epath.Path, parse: Callable[[io.TextIOBase], Iterator[Record]]) -> Iterator[Record]:
    try:
        with open_text(file) as text:
            yield from parse(text)
    except UnicodeDecodeError:
        raise UserError(f"{file}, line {_undecodable(file)}: not UTF-8 text; convert the file to UTF-8") from None


@contextmanager
def open_text(file: epath.Path, errors: str = "strict") -> Iterator[io.TextIOBase]:
    """Yield a stream of a file's text, with or without the byte order mark that Excel writes; ends of lines stay.

    Raises UserError, also while the block reads from it, where the file cannot be read or unpacked.
    """
    try:
        with open_file(file) as stream, io.TextIOWrapper(stream, "utf-8-sig", errors, newline="") as text:
            yield text
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be read: {error}; restore or remove the file") from error


def _undecodable(file: epath.Path) -> int:
    """Return the number of the first line that is not UTF-8."""
    number = 0
    try:
        with open_file(file) as stream:
            while line := stream.readline(LONGEST_LINE):
                number += 1
                line.decode()
    except (UnicodeDecodeError, OSError, EOFError, zlib.error):  # an archive may be damaged as well
        pass
    return number


def lines_of(stream: io.TextIOBase, file: epath.Path) -> Iterator[str]:
    """Yield the lines of a file. Raises UserError for one that is too long to be a record."""
    number = 0
    while line := stream.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE:
            raise UserError(
                f"{file}, line {number}: a line of more than {LONGEST_LINE} characters; split the file's lines"
            )
        yield line


def _whole(stream: io.TextIOBase, file: epath.Path) -> str:
    text = stream.read(_LONGEST_LIST)
    if len(text) == _LONGEST_LIST:
        raise UserError(f"{file}: more than {_LONGEST_LIST} characters in one JSON value; write a record on each line")
    return text


def read_json(file: epath.Path) -> Iterator[Record]:
    """Yield the records of JSON lines, or of one JSON list."""

    def parse(stream: io.TextIOBase) -> Iterator[Record]:
        first = True
        for number, line in enumerate(lines_of(stream, file), 1):
            if not line.strip():
                continue
            if first and line.lstrip().startswith("["):
                yield from _json_list(file, "\n" * (number - 1) + line + _whole(stream, file))
                return
            first = False
            yield read_line(line, f"{file}, line {number}")

    return read_text_file(file, parse)


def read_line(line: str, where: str) -> Record:
    """Return the record of one line of JSON; with its `error` where it has none."""
    try:
        return _record(_JSON.decode(line), where)
    except (ValueError, RecursionError) as error:
        return Record({}, where, str(_malformed(error, where, "line")))


def _json_list(file: epath.Path, text: str) -> Iterator[Record]:
    """Yield the records of a JSON list, one after another."""
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
    """Return where the white space from `at` on ends."""
    match = _BLANKS.match(text, at)
    assert match
    return match.end()


def read_object(file: epath.Path, field: str) -> Iterator[Record]:
    """Yield the records in a list of one JSON object; each gets its other fields, and the file's name as `task`."""

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
            raise UserError(f"{file}: no list of records in the field {field!r}; its fields: {listed(whole)}")
        shared = {"task": _stem(file)} | {name: value for name, value in whole.items() if name != field}
        for i, fields in enumerate(whole[field], 1):
            record = _record(fields, f"{file}, {field} {i}")
            yield record._replace(fields=shared | record.fields)

    return read_text_file(file, parse)


def _stem(file: epath.Path) -> str:
    return file.name.removesuffix(file.suffix if file.suffix in (".gz", ".zst") else "").rpartition(".")[0]


class _Repeated(ValueError):
    """Raised for an object that has a key twice."""


def _object(pairs: list[tuple[str, Any]]) -> Fields:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Repeated(repeated([key for key, _ in pairs]))
    return found


def repeated(names: Sequence[str]) -> str:
    return listed(repr(name) for name, number in Counter(names).items() if number > 1)


def listed(names: Iterable[Any]) -> str:
    """Return names for a message, which may be many and long, with commas between them."""
    texts = [shorten(str(name), 60) for name in names]
    return ", ".join(texts[:20]) + (f" and {len(texts) - 20} more" if len(texts) > 20 else "")


_JSON = json.JSONDecoder(object_pairs_hook=_object)


def _malformed(error: Exception, where: str, what: str) -> UserError:
    if isinstance(error, _Repeated):
        return UserError(f"{where}: an object has the key {error} more than once; keep one of them")
    reason = "nested too deeply" if isinstance(error, RecursionError) else error
    return UserError(f"{where}: not valid JSON ({reason}); fix or remove the {what}")


def _record(fields: Any, where: str) -> Record:
    if not isinstance(fields, dict):
        return Record({}, where, f"{where}: expected an object with fields, got {type(fields).__name__}")
    return Record(fields, where)
