"""Data sets of every supported kind as a stream of records: dicts, each with its file and line."""

import hashlib
import itertools
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from jax_it import files
from jax_it.config import Source
from jax_it.data import builtin
from jax_it.data.records import InvalidRecord, Record, read_json, read_object, suffix_of
from jax_it.data.tables import read_csv, read_parquet
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
    except Exception as error:  # of a dozen types: it is not there, not for this user, or not to be reached
        raise _not_loaded(source, where, error) from error


def _read_all(source: Source, where: str) -> Iterator[Record]:
    kind = _kind(source, where)
    _check_settings(source, kind, where)
    if kind == "builtin":
        if source.path != _BUILTIN:
            raise UserError(f"{where}: there is no built-in data set {source.path}; the only one is {_BUILTIN}")
        for i, fields in enumerate(builtin.records(source.split)):
            yield Record(fields, f"{source.path}, record {i + 1}")
    elif kind == "datasets":
        for i, fields in enumerate(_load_dataset(source, where)):
            yield Record(fields, f"{source.path} ({source.split}), row {i + 1}")
    else:
        for file in _files(source, where):
            records = read_object(file, source.records) if source.records else _READERS[kind](file)
            yield from itertools.islice(records, source.max_per_file or None)


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
            f"{where}: cannot tell the format of {source.path} by its name; use {', '.join(_SUFFIXES)} "
            "(.gz and .zst may follow), or set the source's format"
        )
    return kinds.pop()


_READ_BY = {  # settings that not every kind of source reads
    "records": ("json",), "file_list": ("json", "csv", "parquet"), "max_per_file": ("json", "csv", "parquet"),
    "subset": ("datasets",), "revision": ("datasets",), "split": ("datasets", "builtin"),
}  # fmt: skip


def _check_settings(source: Source, kind: str, where: str) -> None:
    """Refuse settings that nothing would read, and a name that cannot be printed."""
    if not source.name.isprintable():
        raise UserError(f"{where}.name: {source.name!r} has characters that cannot be printed; choose another")
    for name, kinds in _READ_BY.items():
        if kind not in kinds and getattr(source, name) != getattr(Source(), name):
            what = {"datasets": "hub data sets", "builtin": "the built-in data set"}
            known = " and ".join(what.get(kind, f"{kind} files") for kind in kinds)
            raise UserError(f"{where}.{name} is for {known}, not for {what.get(kind, f'{kind} files')}; leave it out")


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
    """Return the files of a folder that a text file names, one a line, without their ending."""
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


_READERS: dict[str, Callable[[epath.Path], Iterator[Record]]] = {
    "json": read_json,
    "csv": read_csv,
    "parquet": read_parquet,
}
_SUFFIXES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
