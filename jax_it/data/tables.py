"""Records of tables: CSV, tab-separated values and Parquet."""

import csv
import io
from collections.abc import Iterator
from typing import Any

from etils import epath

from jax_it.data.records import LONGEST_LINE, Record, lines_of, read_text_file, repeated, suffix_of
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
