"""Records of tables: CSV, tab-separated values and Parquet."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from jax_it.data.records import LONGEST_LINE, Fields, Record, lines_of, read_text_file, repeated, suffix_of
from jax_it.errors import UserError, first_line


def read_csv(file: epath.Path) -> Iterator[Record]:
    """Yield the rows of a CSV file, tab-separated if its name ends in .tsv; the first line names the fields."""

    def parse(stream: io.TextIOBase) -> Iterator[Record]:
        csv.field_size_limit(LONGEST_LINE)
        delimiter = "\t" if suffix_of(file) == ".tsv" else ","
        reader = csv.DictReader(lines_of(stream, file), delimiter=delimiter, strict=True)
        try:
            names = reader.fieldnames or ()
            if len(set(names)) < len(names):
                raise UserError(f"{file}, line 1: columns have the same name: {repeated(names)}; rename or remove one")
            for fields in reader:
                where = f"{file}, line {reader.line_num}"
                if None in fields or None in fields.values():
                    yield Record({}, where, f"{where}: expected {len(names)} columns; fix the line")
                else:
                    yield Record(fields, where)
        except csv.Error as error:
            where = f"{file}, line {reader.line_num + 1}"  # line_num is where the last whole record ended
            raise UserError(f"{where}: not valid CSV ({error}); fix the line") from None

    return read_text_file(file, parse)


def read_parquet(file: epath.Path) -> Iterator[Record]:
    """Yield the rows of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with file.open("rb") as stream:
            table = pyarrow.parquet.ParquetFile(stream)
            names = table.schema_arrow.names
            if len(set(names)) < len(names):
                raise UserError(f"{file}: columns have the same name: {repeated(names)}; rename or remove one")
            for batch in table.iter_batches():
                try:
                    records = [Record(fields, "") for fields in batch.to_pylist()]
                except (ValueError, OverflowError, LookupError):  # also of zoneinfo, for a time zone
                    records = [_read_row(batch, number) for number in range(batch.num_rows)]
                for record in records:
                    row += 1
                    where = f"{file}, row {row}"
                    yield Record(without_fill_ins(record.fields), where, record.error and f"{where}, {record.error}")
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read after row {row}: {first_line(error)}") from error


def without_fill_ins(fields: Fields) -> Fields:
    """Return a row of an Arrow table without the nulls that Arrow put into its conversation and tools.

    In a column of objects each has all keys that any of them has, with null for those that it lacks: a tool call would
    get the arguments of all other tools. Whether a null was there before cannot be known, but for an argument that its
    tool requires: that one is kept.
    """
    if not fields.keys() & {"messages", "conversations", "tools"}:
        return fields
    found = dict(fields)
    found["tools"] = _without_nulls(fields.get("tools"), {})
    required = {}
    for tool in found["tools"] if isinstance(found["tools"], list) else ():
        function = tool.get("function", tool) if isinstance(tool, dict) else {}
        if isinstance(function, dict) and isinstance(function.get("parameters"), dict):
            required[function.get("name")] = function["parameters"].get("required") or ()
    for name in ("messages", "conversations"):
        if name in fields:
            found[name] = _without_nulls(fields[name], required)
    if "tools" not in fields:
        del found["tools"]
    return found


def _without_nulls(value: Any, required: Mapping[Any, Sequence[str]]) -> Any:
    """Return a value without the null fields of the objects in it; `required` has arguments to keep, by tool."""
    if isinstance(value, list):
        return [_without_nulls(item, required) for item in value]
    if not isinstance(value, dict):
        return value
    found = {name: _without_nulls(item, required) for name, item in value.items() if item is not None}
    if isinstance(arguments := value.get("arguments"), dict):
        kept = {name for name in required.get(value.get("name"), ()) if name in arguments}
        found["arguments"] = {
            name: _without_nulls(item, required) for name, item in arguments.items() if item is not None or name in kept
        }
    return found


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
