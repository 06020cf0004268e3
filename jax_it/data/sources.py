"""Data sets of every supported kind as a stream of records: dicts, each with its file and line."""

import hashlib
import itertools
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from jax_it import files
from jax_it.config import Source
from jax_it.data import builtin
from jax_it.data.records import InvalidRecord, Record, read_json, read_object, suffix_of
from jax_it.data.tables import read_csv, read_parquet, without_fill_ins
from jax_it.errors import UserError, first_line

_BUILTIN = "builtin:instructions"
_COMMIT = re.compile("[0-9a-f]{40}")


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
        raise UserError(f"{source.path} holds no records; remove it from {where} or add some")


def line_files(source: Source, where: str) -> list[epath.Path] | None:
    """Return the files whose lines are the records of a data set; None where it is of another kind.

    Of these a file that holds one JSON list is still read as a whole. Raises UserError as `read` does.
    """
    kind = _kind(source, where)
    _check_settings(source, kind, where)
    partial = source.limit or source.max_per_file
    return None if kind != "json" or source.records or partial else _files(source, where)


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
            # The suffix tells commas from tabs, and the name becomes the field "task".
            parts.update((file.name if source.records else suffix_of(file)).encode())
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
    except Exception as error:  # any of a dozen types: it does not exist, is private or cannot be reached
        raise _not_loaded(source, where, error) from error


def _read_all(source: Source, where: str) -> Iterator[Record]:
    kind = _kind(source, where)
    _check_settings(source, kind, where)
    found = KINDS[kind]
    if found.read is not None:
        yield from found.read(source, where)
        return
    assert found.read_file is not None
    for file in _files(source, where):
        records = read_object(file, source.records) if source.records else found.read_file(file)
        yield from itertools.islice(records, source.max_per_file or None)


def _read_builtin(source: Source, where: str) -> Iterator[Record]:
    if source.path != _BUILTIN:
        raise UserError(f"{where}: there is no built-in data set {source.path}; the only one is {_BUILTIN}")
    for i, fields in enumerate(builtin.records(source.split)):
        yield Record(fields, f"{source.path}, record {i + 1}")


def _read_dataset(source: Source, where: str) -> Iterator[Record]:
    for i, fields in enumerate(_load_dataset(source, where)):
        yield Record(without_fill_ins(fields), f"{source.path} ({source.split}), row {i + 1}")


def _kind(source: Source, where: str) -> str:
    if source.format != "auto":
        return source.format
    if source.path.startswith("builtin:"):
        return "builtin"
    path = files.locate(source.path, f"{where}.path")
    if not path.exists() and not files.matches(path):
        if suffix_of(path) in _SUFFIXES or source.path.startswith(".") or path.is_absolute():
            raise UserError(f"{where}: data file {source.path} does not exist")
        if path.suffix:
            raise UserError(
                f"{where}: data file {source.path} does not exist; if it is a data set of the hub, set its "
                "format to 'datasets'"
            )
        return "datasets"
    kinds = {_SUFFIXES.get(suffix_of(file), "") for file in _files(source, where)}
    if len(kinds) != 1 or "" in kinds:
        raise UserError(
            f"{where}: cannot tell the format of {source.path} from its name; use {', '.join(_SUFFIXES)} "
            "(.gz and .zst may follow), or set the source's format"
        )
    return kinds.pop()


def _check_settings(source: Source, kind: str, where: str) -> None:
    """Refuse settings that nothing would read, and a name that cannot be printed."""
    if not source.name.isprintable():
        raise UserError(f"{where}.name: {source.name!r} has characters that cannot be printed; choose another")
    for name in dict.fromkeys(name for found in KINDS.values() for name in found.settings):
        if name not in KINDS[kind].settings and getattr(source, name) != getattr(Source(), name):
            known = " and ".join(found.what for found in KINDS.values() if name in found.settings)
            raise UserError(f"{where}.{name} is for {known}, not for {KINDS[kind].what}; leave it out")


def _files(source: Source, where: str) -> list[epath.Path]:
    path = files.locate(source.path, f"{where}.path")
    if source.file_list:
        return _listed(path, source.file_list, where)
    if not path.exists():
        found = files.matches(path)
    elif path.is_dir():
        kinds = set(_SUFFIXES.values()) if source.format == "auto" else {source.format}
        try:
            found = sorted(file for file in path.iterdir() if _SUFFIXES.get(suffix_of(file)) in kinds)
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
            raise UserError(f"{where}: {file} is {_what(file)}, not a regular file, which can be read more than once")
    return found


def read_text(name: str, where: str) -> str:
    """Return a text file's content. Raises UserError that begins with `where`."""
    file = files.locate(name, where)
    try:
        if file.exists() and not files.is_regular(file):
            raise OSError(f"it is {_what(file)}")
        text: str = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: {name} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return text


def _what(file: epath.Path) -> str:
    """Return what a path is that is not a regular file."""
    if file.is_dir():
        return "a folder"
    if not file.exists():
        return "a broken link"
    return "a pipe" if stat.S_ISFIFO(os.stat(file).st_mode) else "a device or socket"


def _listed(folder: epath.Path, names: str, where: str) -> list[epath.Path]:
    """Return the files of a folder that a text file lists: one per line, without extension."""
    lines = read_text(names, f"{where}.file_list").split()
    if not lines:
        raise UserError(f"{where}.file_list: {names} lists no files; write one per line")
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


@dataclass(frozen=True)
class Kind:
    """A kind of data source, which `config.data.train.0.format` names.

    Sources of files have `suffixes` and `read_file`, others `read`, and a branch of their own in `digest`.
    """

    what: str  # in messages
    settings: tuple[str, ...]  # of config.Source, those that not every kind has
    suffixes: tuple[str, ...] = ()
    read_file: Callable[[epath.Path], Iterator[Record]] | None = None
    read: Callable[[Source, str], Iterator[Record]] | None = None  # of the source and its name in the config


_OF_FILES = ("file_list", "max_per_file")

# A new kind is an entry here and a value of `config.Source.format`.
KINDS = {
    "json": Kind("json files", ("records", *_OF_FILES), (".jsonl", ".json"), read_json),
    "csv": Kind("csv files", _OF_FILES, (".csv", ".tsv"), read_csv),
    "parquet": Kind("parquet files", _OF_FILES, (".parquet",), read_parquet),
    "datasets": Kind("hub data sets", ("subset", "revision", "split"), read=_read_dataset),
    "builtin": Kind("the built-in data set", ("split",), read=_read_builtin),
}
_SUFFIXES = {suffix: name for name, kind in KINDS.items() for suffix in kind.suffixes}
