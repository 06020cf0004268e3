"""A data set as token ids on disk: made once for a key, then memory-mapped.

The key covers the data's bytes, the template, the tokenizer with its chat template, the format, the lengths, the code
and the libraries, so that nothing stale is ever read. A folder is written under another name and renamed: it is whole
or absent. Checksums of all its files tell whether one has changed.
"""

import ast
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain, islice, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_it import files, hosts
from jax_it.config import Data, Source
from jax_it.data import promptsource, sources, templates
from jax_it.data.encoded import Encoded
from jax_it.data.encoding import Counts
from jax_it.data.fewshot import FewShot, read_pool
from jax_it.data.formats import Format
from jax_it.data.records import InvalidRecord, Record
from jax_it.data.templates import Example
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError, first_line, shown
from jax_it.status import Bar
from jax_it.workers import Workers

_CHUNK = 1000  # records that the tokenizer takes at a time


@dataclass(frozen=True)
class Tokenized:
    """One source under one template: example i's tokens, special tokens included; none if it was dropped.

    For a causal model all tokens are target tokens, and one that is trained on is stored as its bitwise complement,
    which is negative.
    """

    name: str
    template: str
    counts: Counts
    source_tokens: np.ndarray  # all examples' tokens, one after another
    source_ends: np.ndarray  # int64 [examples + 1]: example i is tokens[ends[i]:ends[i + 1]]
    target_tokens: np.ndarray
    target_ends: np.ndarray
    # int64 [examples]: the number of the record that each example is made of, from 0; its bitwise complement where the
    # template is not meant for the record.
    signed_records: np.ndarray
    digest: str = ""  # of the source's records

    def example(self, i: int) -> Encoded:
        source = self.source_tokens[self.source_ends[i] : self.source_ends[i + 1]]
        target = self.target_tokens[self.target_ends[i] : self.target_ends[i + 1]]
        mask = target < 0
        return Encoded(source, np.where(mask, ~target, target), 0, mask) if mask.any() else Encoded(source, target)

    @property
    def records(self) -> np.ndarray:
        return np.where(self.skipped, ~self.signed_records, self.signed_records)

    @property
    def skipped(self) -> np.ndarray:
        return self.signed_records < 0

    @property
    def source_lengths(self) -> np.ndarray:
        return np.diff(self.source_ends)

    @property
    def target_lengths(self) -> np.ndarray:
        return np.diff(self.target_ends)


_NOTHING = Encoded(np.zeros(0, np.int32), np.zeros(0, np.int32))
_ARRAYS = ("source_tokens", "source_ends", "target_tokens", "target_ends", "signed_records")
_INDEX = "index.txt"  # the counts and the arrays' checksums in its second line, whose own checksum is the first


def tokenize(source: Source, where: str, data: Data, tokenizer: Tokenizer, format: Format) -> list[Tokenized]:
    """Return the source's token ids under each of its templates, from the cache or made now.

    Raises UserError for records that cannot be read or rendered, unless `data.on_invalid` drops them, and where more
    is dropped, cut or unknown than the config's limits allow.
    """
    made = []
    cache = _cache(data)
    named = promptsource.expand(source.template, f"{where}.template")
    if data.train_on == "per_turn" and (len(named) > 1 or source.num_fewshot != (0,)):
        raise UserError(
            f"{where}.template: data.train_on='per_turn' needs data sets of one template; leave the others out"
        )
    with hosts.first_then_others():  # what is downloaded or made once, the others find, where they share a disk
        digest = sources.digest(source, where)
        for (name, template), shots in product(named, source.num_fewshot):
            folder = cache / _key(digest, template, shots, data, tokenizer, format)
            if not os.path.lexists(folder):
                _write(folder, source, where, template, shots, data, tokenizer, format)
            made.append(_open(folder, sources.name_of(source), f"{name}, {shots}-shot" if shots else name, digest))
    for item in made:
        _check_limits(item, data)
    return made


def save(made: Sequence[Sequence[Tokenized]], folder: str, data: Data, tokenizer: Tokenizer, format: Format) -> None:
    """Write tokenized training data into a new folder, which `load` reads without the records.

    Raises UserError for a folder that is there already or cannot be written.
    """
    output = files.locate_local(folder, "--output")
    if os.path.lexists(output):
        raise UserError(f"--output: {output} already exists; name another, or remove it")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with files.new_folder(output.parent, ".part-") as part:
            for i, templates_ in enumerate(made):
                for j, item in enumerate(templates_):
                    (part / f"{i}.{j}").mkdir()
                    for array in _ARRAYS:
                        getattr(item, array).tofile(part / f"{i}.{j}" / f"{array}.bin")
                    _write_index(part / f"{i}.{j}", item.counts)
            named = [[(item.name, item.template, item.digest) for item in templates_] for templates_ in made]
            manifest = {"made_with": _made_with(data, tokenizer, format), "data_sets": named}
            (part / _MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False), encoding="utf-8")
            part.rename(output)
    except OSError as error:
        raise UserError(
            f"--output: cannot write {output}: {error.strerror or error}; {files.remedy(error.strerror)} "
            "or name another"
        ) from error


def load(data: Data, tokenizer: Tokenizer, format: Format) -> list[list[Tokenized]]:
    """Return the training data in the folder `data.tokenized`, which `save` wrote.

    Raises UserError for a folder that is not one of these or is damaged, and for one that was made with other data
    sets, templates, lengths or another tokenizer.
    """
    where = "config.data.tokenized"
    folder = files.locate_local(data.tokenized, where)
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        made_with, data_sets = manifest["made_with"], [[tuple(item) for item in each] for each in manifest["data_sets"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{where}: {folder} was not written by 'jax-it data tokenize': {reason}") from None
    for name, value in _made_with(data, tokenizer, format).items():
        if made_with.get(name) != value:
            raise UserError(f"{where}: {folder} was made with another {name}; run 'jax-it data tokenize' again")
    names = [sources.name_of(source) for source in data.train]
    if names != [each[0][0] for each in data_sets]:
        there = ", ".join(each[0][0] for each in data_sets)
        raise UserError(f"{where}: {folder} has the data sets {there}, and config.data.train has {', '.join(names)}")
    made = [[_open(folder / f"{i}.{j}", *item) for j, item in enumerate(each)] for i, each in enumerate(data_sets)]
    for item in chain(*made):
        _check_limits(item, data)
    return made


_MANIFEST = "manifest.json"


def _made_with(data: Data, tokenizer: Tokenizer, format: Format) -> dict[str, Any]:
    """Return what decides the tokens of given records, as JSON has it."""
    made_with = {
        "tokenizer": tokenizer.digest(),
        "length, truncate or train_on": format.key(data),
        "template": [source.template for source in data.train],
        "num_fewshot": [source.num_fewshot for source in data.train],
        "limit": [source.limit for source in data.train],
    }
    found: dict[str, Any] = json.loads(json.dumps(made_with))
    return found


def _cache(data: Data) -> Path:
    """Return the folder of all caches, which must be local: they are memory-mapped."""
    folder = files.locate_local(data.cache_dir, "config.data.cache_dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"config.data.cache_dir: cannot make {folder}: {error.strerror}; name another") from error
    return folder


def _key(digest: str, template: str, shots: int, data: Data, tokenizer: Tokenizer, format: Format) -> str:
    parts = (digest, template, shots, tokenizer.digest(), format.key(data), _code())
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


@cache
def _code() -> str:
    """Return a hash of the code that turns records into tokens, and of the versions of the libraries that it uses."""
    modules, libraries = _imports("tokenized", "tokenizer_files")
    installed = importlib.metadata.packages_distributions()
    names = sorted({name for library in libraries for name in installed.get(library, ())})
    versions = [platform.python_version(), *(f"{name} {importlib.metadata.version(name)}" for name in names)]
    return hashlib.blake2b(repr((sorted(modules.items()), versions)).encode(), digest_size=8).hexdigest()


def _imports(*roots: str) -> tuple[dict[str, bytes], set[str]]:
    """Return the source of modules of this package, and of all those of it that they import, by name.

    Also return the names of the libraries that these import.
    """
    package = __name__.rpartition(".")[0]
    modules: dict[str, bytes] = {}
    libraries: set[str] = set()
    waiting = [*roots]
    while waiting:
        file = Path(__file__).with_name(f"{waiting.pop()}.py")
        if file.stem in modules or not file.is_file():  # a name may be that of a function
            continue
        modules[file.stem] = file.read_bytes()
        for node in ast.walk(ast.parse(modules[file.stem])):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            waiting += [name.split(".")[2] for name in names if name.startswith(f"{package}.")]
            libraries |= {name.split(".")[0] for name in names}
    return modules, libraries - {package.split(".")[0], *sys.stdlib_module_names}


def _write(
    folder: Path, source: Source, where: str, template: str, shots: int, data: Data, tokenizer: Tokenizer,
    format: Format,
) -> None:  # fmt: skip
    try:
        with files.new_folder(folder.parent, ".part-") as part:
            counts = Counts()
            _write_tokens(part, _tokenize_records(source, where, template, shots, data, tokenizer, format, counts))
            counts.check_invalid(sources.name_of(source), data)
            _write_index(part, counts)
            try:
                part.rename(folder)
            except OSError:  # another process was faster, with the same content
                if not (folder / _INDEX).is_file():
                    raise
    except OSError as error:
        raise UserError(
            f"config.data.cache_dir: cannot write {folder}: {error.strerror or error}; "
            f"{files.remedy(error.strerror)} or name another"
        ) from error


def _write_index(folder: Path, counts: Counts) -> None:
    checksums = {array: _checksum(_map(folder, array)) for array in _ARRAYS}
    content = json.dumps({"counts": asdict(counts), "checksums": checksums})
    (folder / _INDEX).write_text(f"{zlib.crc32(content.encode())}\n{content}\n", encoding="utf-8")


class _Example(NamedTuple):
    record: int  # its number
    encoded: Encoded | None  # None if it was dropped or skipped
    skipped: bool = False  # the template gives no text for it, or no few-shot example fits


class _Chunk(NamedTuple):
    """Some examples as they are on disk: tokens one after another, and how many each example has."""

    counts: Counts
    source_tokens: np.ndarray
    source_lengths: np.ndarray
    target_tokens: np.ndarray
    target_lengths: np.ndarray
    signed_records: np.ndarray  # within the chunk


def _chunk(examples: Sequence[_Example], counts: Counts) -> _Chunk:
    sources, targets = [], []
    for example in examples:
        source, target, _, mask = example.encoded or _NOTHING
        sources.append(source)
        # Trained tokens are negative on disk; see Tokenized.
        targets.append(target if mask is None else np.where(mask, ~target, target))
    return _Chunk(
        counts,
        np.concatenate([_NOTHING.source, *sources], dtype=np.int32),
        np.array([len(source) for source in sources], np.int64),
        np.concatenate([_NOTHING.target, *targets], dtype=np.int32),
        np.array([len(target) for target in targets], np.int64),
        np.array([~example.record if example.skipped else example.record for example in examples], np.int64),
    )


def _write_tokens(folder: Path, chunks: Iterable[_Chunk]) -> None:
    """Write the arrays of a data set chunk by chunk, so that memory doesn't grow with it."""
    with ExitStack() as stack:
        files = {array: stack.enter_context((folder / f"{array}.bin").open("wb")) for array in _ARRAYS}
        ends = {"source": 0, "target": 0}
        for side in ends:
            files[f"{side}_ends"].write(np.zeros(1, np.int64).tobytes())
        for chunk in chunks:
            for side in ends:
                of_chunk = ends[side] + np.cumsum(getattr(chunk, f"{side}_lengths"))
                files[f"{side}_tokens"].write(getattr(chunk, f"{side}_tokens").tobytes())
                files[f"{side}_ends"].write(of_chunk.tobytes())
                ends[side] = int(of_chunk[-1]) if len(of_chunk) else ends[side]
            files["signed_records"].write(chunk.signed_records.tobytes())


def _open(folder: Path, name: str, template: str, digest: str) -> Tokenized:
    try:
        if not all((folder / name).is_file() for name in (_INDEX, *map("{}.bin".format, _ARRAYS))):
            raise FileNotFoundError  # or what is there is a pipe, which would never end
        checksum, content = (folder / _INDEX).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        arrays = {array: _map(folder, array) for array in _ARRAYS}
        whole = checksum == str(zlib.crc32(content.encode()))
        index = json.loads(content) if whole else {}
        whole = whole and all(_checksum(arrays[array]) == index["checksums"][array] for array in _ARRAYS)
    except (OSError, ValueError):
        whole = False
    if not whole:
        raise UserError(f"the cached data set {folder} is damaged; delete it and it will be rebuilt")
    return Tokenized(name, template, Counts(**index["counts"]), **arrays, digest=digest)


def _map(folder: Path, array: str) -> np.ndarray:
    file, dtype = folder / f"{array}.bin", np.int32 if array.endswith("tokens") else np.int64
    return np.memmap(file, dtype, "r") if file.stat().st_size else np.zeros(0, dtype)


def _checksum(array: np.ndarray) -> int:
    checksum, content = 0, array.data.cast("B") if len(array) else b""
    for start in range(0, len(content), 1 << 24):
        checksum = zlib.crc32(content[start : start + (1 << 24)], checksum)
    return checksum


def _tokenize_records(
    source: Source, where: str, template: str, shots: int, data: Data, tokenizer: Tokenizer, format: Format,
    counts: Counts,
) -> Iterator[_Chunk]:  # fmt: skip
    """Yield the examples of every record; counts as it goes."""
    fewshot = None
    if shots:
        pool = read_pool(sources.read(source, where, keep_invalid=True), template)
        length, with_answer = getattr(data, format.length_field), format.length_field == "max_seq_length"
        fewshot = FewShot(shots, template, pool, tokenizer, length, with_answer)
    records = sources.read(source, where, keep_invalid=True)
    chunks = iter(lambda: list(islice(records, _CHUNK)), [])
    tokenize = _Tokenize(template, fewshot, data, tokenizer, format)
    first = 0
    with (
        Bar(f"tokenizing {sources.name_of(source)}", unit="examples") as bar,
        Workers(data.num_workers, option="config.data.num_workers") as workers,
    ):
        for number, chunk in workers.map(tokenize, chunks):
            counts.add(chunk.counts)
            signed = chunk.signed_records
            yield chunk._replace(signed_records=np.where(signed < 0, signed - first, signed + first))
            first += number
            bar.update(number)


@dataclass(frozen=True)
class _Tokenize:
    """Turns records into a chunk, in this process or another."""

    template: str
    fewshot: FewShot | None
    data: Data
    tokenizer: Tokenizer
    format: Format

    def __call__(self, records: Sequence[Record]) -> tuple[int, _Chunk]:
        counts = Counts()
        examples = _tokenize_chunk(records, self.template, self.fewshot, self.data, self.tokenizer, self.format, counts)
        return len(records), _chunk(examples, counts)


def _tokenize_chunk(
    records: Sequence[Record], template: str, fewshot: FewShot | None, data: Data, tokenizer: Tokenizer,
    format: Format, counts: Counts,
) -> list[_Example]:  # fmt: skip
    """Return the examples of some records, which are numbered from 0; add what became of them to the counts."""

    def encode(examples: Sequence[tuple[int, Example]]) -> Iterable[Encoded | None]:
        part = Counts()
        locations = [records[i].where for i, _ in examples]
        try:
            encoded = list(format.encode([example for _, example in examples], locations, data, tokenizer, part))
        except InvalidRecord as error:
            if len(examples) == 1:
                counts.add_invalid(error)
                return [None]
            half = len(examples) // 2
            return [*encode(examples[:half]), *encode(examples[half:])]
        counts.add(part)
        return encoded

    examples: list[tuple[int, Example]] = []
    found: list[_Example] = []
    for i, record in enumerate(records):
        try:
            example: Example | None = templates.render(record, template)
            if example and example.is_blank and template not in templates.TEMPLATES:
                example = None
            if example and fewshot:
                example = fewshot.before(record, example)
        except InvalidRecord as error:
            counts.add_invalid(error)
            found.append(_Example(i, None))
            continue
        if example is None:
            counts.add(Counts(examples=1, skipped=1))
            found.append(_Example(i, None, skipped=True))
            continue
        examples += [(i, part) for part in (example.per_turn() if data.train_on == "per_turn" else [example])]
    if examples:
        found += map(_Example, (i for i, _ in examples), encode(examples))
    return sorted(found, key=lambda example: example.record)


def _check_limits(item: Tokenized, data: Data) -> None:
    counts = item.counts
    tokens = max(counts.source_tokens + counts.target_tokens, 1)
    counts.check_invalid(item.name, data)
    dropped = f"{counts.empty_completion} with an empty completion, {counts.too_long} too long"
    if counts.invalid:
        dropped = f"{counts.invalid} invalid, {dropped}"
    if not counts.kept:
        if counts.skipped:
            dropped = f"{dropped}, {counts.skipped} without any text by the template {shown(item.template, 60)}"
        reasons = f": {counts.shown_reasons(most=3)}" if counts.invalid else ""
        raise UserError(f"data set {item.name}: none of its {counts.examples} examples is left: {dropped}{reasons}")
    vanished = counts.vanished
    shares = (
        ("max_dropped", counts.dropped, counts.examples, f"examples dropped ({dropped})"),
        ("max_truncated", counts.truncated, counts.examples, "examples truncated"),
        (
            "max_unknown",
            counts.unknown_tokens,
            tokens,
            f"tokens unknown to the tokenizer ({shown_characters(counts.unknown) or 'whole words'})",
        ),
        (
            "max_unknown",
            sum(vanished.values()),
            max(counts.characters, 1),
            f"characters dropped by the tokenizer ({shown_characters(vanished)})",
        ),
    )
    for limit, number, of, what in shares:
        if number / of > getattr(data, limit):
            raise UserError(
                f"data set {item.name}: {number} of {of} {what}, {number / of:.1%}; fix the data, "
                f"or allow it with config.data.{limit}={math.ceil(1000 * number / of) / 1000} or more"
            )


def shown_characters(counted: Mapping[str, int]) -> str:
    """Return the five most frequent characters and how often each occurs."""
    ranked = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{character!a} {number} times" for character, number in ranked[:5]]
    return ", ".join([*shown, *([f"{len(ranked) - 5} others"] if len(ranked) > 5 else [])])


def prompts_and_completions(items: Iterable[Source], where: str) -> Iterator[str]:
    """Yield all texts of some sources, for training a tokenizer."""
    for i, source in enumerate(items):
        for record in sources.read(source, f"{where}.{i}"):
            for _, template in promptsource.expand(source.template, f"{where}.{i}.template"):
                yield from (turn.text for turn in templates.render(record, template).turns)


def eligible(tokenized: Sequence[Tokenized]) -> np.ndarray:
    """Return the indices of the examples that every template of a source kept, but for those that skipped them."""
    kept, some = np.ones(tokenized[0].counts.examples, bool), np.zeros(tokenized[0].counts.examples, bool)
    for item in tokenized:
        of_item = item.target_lengths > 0
        some |= of_item
        kept &= of_item | item.skipped
    return np.flatnonzero(kept & some)
