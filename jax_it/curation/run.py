"""A stage from input to output, with a manifest and a list of the records that were dropped, each with the reason."""

import dataclasses
import datetime
import decimal
import gzip
import hashlib
import importlib.metadata
import json
import platform
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath
from tqdm import tqdm

from jax_it import files
from jax_it.curation.input import ORIGIN, Chunk, Input, location
from jax_it.curation.stage import INVALID, Dropped, Kept, Outcome, Plan, invalid
from jax_it.curation.stages import STAGES
from jax_it.data.records import Record
from jax_it.errors import UserError, first_line

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
PACKAGES = (  # whose versions may change the results
    "jax-it", "datasketch", "ftfy", "numpy", "phonenumbers", "py3langid", "python-stdnum", "rapidfuzz", "regex",
    "xxhash",
)  # fmt: skip
SHOWN = 100  # lines about dropped records that are printed; all are in the list
PARQUET_ROWS = 8192  # of a row group


class Written(NamedTuple):
    """What a stage makes of a chunk."""

    kept: bytes  # lines of JSON
    dropped: bytes
    counts: Counter[str]  # "read", "kept", "dropped"
    reasons: Counter[str]
    changes: Counter[str]
    schema: Any  # pyarrow's, for Parquet


@dataclasses.dataclass(frozen=True)
class _Write:
    """Applies a stage to a chunk and writes the outcomes as JSON."""

    apply: Callable[[Chunk], list[Outcome]]
    write: bool  # the records that are kept; else they are only counted
    drop_invalid: bool
    origins: bool
    schema: bool

    def __call__(self, chunk: Chunk) -> Written:
        parsed = tuple(chunk.records())
        outcomes = self.apply(dataclasses.replace(chunk, text="", parsed=parsed, origins=False))
        kept: list[bytes] = []
        dropped: list[bytes] = []
        reasons: Counter[str] = Counter()
        changes: Counter[str] = Counter()
        for record, outcome in zip(parsed, outcomes, strict=True):
            if isinstance(outcome, Kept):
                origin = {ORIGIN: record.where} if self.origins else {}
                line = _line({**outcome.fields, **origin}, record) if self.write else b""
                if isinstance(line, bytes):
                    kept.append(line)
                    changes.update(outcome.changes)
                    continue
                outcome = line
            if outcome.reason == INVALID and not self.drop_invalid:
                raise UserError(f"{outcome.details['error']}; or leave such records out with --on-invalid=drop")
            reasons[outcome.reason] += 1
            dropped.append(_encoded({**location(record.where), "reason": outcome.reason, **outcome.details}))
        counts = Counter(read=len(parsed), kept=len(kept), dropped=len(dropped))
        schema = _schema(kept) if self.schema else None
        return Written(b"".join(kept), b"".join(dropped), counts, reasons, changes, schema)


def _encoded(fields: Mapping[str, Any]) -> bytes:
    return _JSON.encode(fields).encode("utf-8", errors="backslashreplace") + b"\n"  # escapes halves of surrogate pairs


def _line(fields: Mapping[str, Any], record: Record) -> bytes | Dropped:
    try:
        return _encoded(fields)
    except (TypeError, ValueError) as error:
        return invalid(f"{record.where}: cannot be written as JSON: {first_line(error)}; fix or remove the record")


def _plain(value: Any) -> str:
    """Return values of Parquet columns that JSON lacks."""
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    raise TypeError(f"a value of type {type(value).__name__}")


_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=_plain)


def run(
    stage: str,
    settings: Any,
    input: Input,
    output: epath.Path | None,
    on_invalid: str = "error",
    command: Sequence[str] = (),
    origins: bool = False,
) -> dict[str, Any]:
    """Run a stage and return its manifest; without `output` nothing is written, and the manifest says what would be.

    Beside the output come OUTPUT.dropped.jsonl and, last, OUTPUT.manifest.json. Nothing is there until all is done.
    `origins` writes in each record where it was read at first, as `input.Chunk` reads it. Raises UserError.
    """
    began = datetime.datetime.now(datetime.UTC)
    if output is not None:
        check_output(output, input)
    made_of = identity(stage, settings, input, on_invalid)
    plan = STAGES[stage](settings, input)
    parquet = output is not None and output.suffix == ".parquet"
    apply = _Write(plan.apply, output is not None, on_invalid == "drop", origins, parquet)
    counts: Counter[str] = Counter(read=0, kept=0, dropped=0)
    reasons: Counter[str] = Counter()
    changes: Counter[str] = Counter()
    shown: list[str] = []
    try:
        with _Files(output, input.folder) as to, tqdm(unit=" records", desc=stage, disable=None) as bar:
            for written in (plan.records or input).map(apply, plan.lookup):
                to.write(written)
                counts.update(written.counts)
                reasons.update(written.reasons)
                changes.update(written.changes)
                bar.update(written.counts["read"])
                if plan.describe is not None:
                    for line in written.dropped.splitlines()[: SHOWN - len(shown)]:
                        shown += plan.describe(json.loads(line))
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write {output}: {reason}; {files.remedy(reason)} or name another file") from error
    manifest = {
        **made_of,
        "command": list(command),
        "began": began.isoformat(timespec="seconds"),
        "seconds": round((datetime.datetime.now(datetime.UTC) - began).total_seconds(), 1),
        "counts": dict(counts),
        "dropped": dict(sorted(reasons.items())),
        "changed": dict(sorted(changes.items())),
        "report": dict(plan.report),
    }
    if output is not None and not files.is_stream(output):
        manifest["output"] = {"file": output.name, "digest": digest(output)}
        files.write_output(manifest_of(output), manifest, "the manifest")
    shown = shown[:SHOWN]
    print(
        "\n".join([*shown, _summary(stage, plan, manifest)]),
        file=sys.stderr if output and files.is_stream(output) else sys.stdout,
    )
    return manifest


def identity(stage: str, settings: Any, input: Input, on_invalid: str) -> dict[str, Any]:
    """Return everything that decides what a stage makes."""
    return {
        "stage": stage,
        "settings": json.loads(files.to_json(dataclasses.asdict(settings))),
        "on_invalid": on_invalid,
        "inputs": input.describe(),
        "reads": _read_beside(settings),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _read_beside(settings: Any) -> dict[str, str]:
    """Return a hash of each file that a stage's settings name."""
    found = {}
    for field in dataclasses.fields(settings):
        if field.metadata.get("reads"):
            value = getattr(settings, field.name)
            for name in [value] if isinstance(value, str) else value:
                file = files.locate(name.partition(":")[0] if ".py:" in name else name) if name else None
                if file is not None and files.is_regular(file):
                    found[name] = digest(file)
    return found


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def manifest_of(output: epath.Path) -> epath.Path:
    return output.with_name(f"{output.name}.manifest.json")


def dropped_of(output: epath.Path) -> epath.Path:
    return output.with_name(f"{output.name}.dropped.jsonl")


def digest(file: epath.Path) -> str:
    with files.open_binary(file) as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def check_output(output: epath.Path, input: Input) -> None:
    """Raise UserError for a file whose name does not tell its format, or that is also read."""
    if not files.is_stream(output) and not output.name.endswith(SUFFIXES):
        raise UserError(f"--output: cannot tell the format of {output} from its name; use {', '.join(SUFFIXES)}")
    if any(files.locate(source.path) == output for source in input.sources):
        raise UserError(f"--output: {output} is also read; name another file")


class _Files:
    """The output and the list of dropped records while they are written; nothing where there is no output."""

    def __init__(self, output: epath.Path | None, folder: Path):
        self._output, self._folder = output, folder
        self._schema: Any = None

    def __enter__(self) -> "_Files":
        self._stack = ExitStack()
        output = self._output
        if output is None:
            return self
        target = self._stack.enter_context(files.open_atomically(output))
        if output.suffix == ".parquet":
            # The columns are known when all records have been seen.
            self._kept: Any = self._stack.enter_context(tempfile.TemporaryFile(dir=self._folder))
            self._target = target
        else:
            self._kept = self._stack.enter_context(_packed(target, output.suffix))
        if not files.is_stream(output):
            self._dropped = self._stack.enter_context(files.open_atomically(dropped_of(output)))
        return self

    def write(self, written: Written) -> None:
        if self._output is None:
            return
        self._kept.write(written.kept)
        if not files.is_stream(self._output):
            self._dropped.write(written.dropped)
        if written.schema is not None:
            self._schema = _unified(self._schema, written.schema, self._output)

    def __exit__(self, *error: Any) -> None:
        try:
            if error[0] is None and self._output is not None and self._output.suffix == ".parquet":
                self._kept.seek(0)
                _write_parquet(self._kept, self._schema, self._target, self._output)
        except BaseException:
            self._stack.__exit__(*sys.exc_info())
            raise
        self._stack.__exit__(*error)


@contextmanager
def _packed(stream: Any, suffix: str) -> Iterator[Any]:
    """Yield a stream that packs what is written to it; the same content gives the same bytes."""
    if suffix == ".gz":
        with gzip.GzipFile("", "wb", fileobj=stream, mtime=0, compresslevel=6) as packed:
            yield packed
    elif suffix == ".zst":
        import zstandard

        with zstandard.ZstdCompressor().stream_writer(stream, closefd=False) as packed:
            yield packed
    else:
        yield stream


def _schema(lines: list[bytes]) -> Any:
    import pyarrow

    try:
        return _table([json.loads(line) for line in lines]).schema if lines else None
    except pyarrow.ArrowException as error:
        raise UserError(f"the records do not fit into columns ({first_line(error)}); write .jsonl") from None


def _unified(one: Any, two: Any, output: epath.Path) -> Any:
    import pyarrow

    try:
        return two if one is None else pyarrow.unify_schemas([one, two], promote_options="permissive")
    except pyarrow.ArrowException as error:
        raise UserError(f"{output}: the records do not fit into columns ({first_line(error)}); write .jsonl") from None


def _table(rows: list[dict[str, Any]], schema: Any = None) -> Any:
    import pyarrow

    if schema is None:
        columns = dict.fromkeys(name for row in rows for name in row)
        return pyarrow.table({name: pyarrow.array([row.get(name) for row in rows]) for name in columns})
    return pyarrow.Table.from_pylist(rows, schema)


def _write_parquet(lines: Any, schema: Any, target: Any, output: epath.Path) -> None:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetWriter(target, schema or pyarrow.schema([])) as writer:
            rows = []
            for line in lines:
                rows.append(json.loads(line))
                if len(rows) == PARQUET_ROWS:
                    writer.write_table(_table(rows, schema))
                    rows = []
            if rows:
                writer.write_table(_table(rows, schema))
    except pyarrow.ArrowException as error:
        raise UserError(f"{output}: the records do not fit into columns ({first_line(error)}); write .jsonl") from None


def _summary(stage: str, plan: Plan, manifest: Mapping[str, Any]) -> str:
    counts = manifest["counts"]
    lines = [plan.text] if plan.text else []
    lines.append(f"{stage}: {counts['read']} records read, {counts['kept']} kept, {counts['dropped']} dropped")
    lines += [f"  dropped  {number} {reason}" for reason, number in manifest["dropped"].items()]
    lines += [f"  changed  {number} {kind}" for kind, number in manifest["changed"].items()]
    return "\n".join(lines)
