"""A data set as token ids on disk: made once for a key, then memory-mapped.

The key covers the data's bytes, the template, the tokenizer with its chat template, the format, the lengths
and the code that made it, so that nothing stale is ever read. A folder is written beside its place and
renamed: whole or absent. Checksums of all its files tell when one is not as it was written.
"""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from jax_it import files, hosts
from jax_it.config import Data, Source
from jax_it.data import sources, templates
from jax_it.data.batches import Encoded
from jax_it.data.encoding import Counts
from jax_it.data.formats import Format
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError
from jax_it.status import Bar

_CHUNK = 1000  # records that the tokenizer takes at a time


@dataclass(frozen=True)
class Tokenized:
    """One source under one template: example i's tokens with all marks; length 0 if it was dropped.

    Of a causal model all tokens are target tokens, and one that is learnt is kept as its bitwise complement,
    which is negative.
    """

    name: str
    template: str
    counts: Counts
    source_tokens: np.ndarray  # all examples' tokens, one after another
    source_ends: np.ndarray  # int64 [examples + 1]: example i is tokens[ends[i]:ends[i + 1]]
    target_tokens: np.ndarray
    target_ends: np.ndarray
    digest: str = ""  # of the source's records

    def example(self, i: int) -> Encoded:
        source = self.source_tokens[self.source_ends[i] : self.source_ends[i + 1]]
        target = self.target_tokens[self.target_ends[i] : self.target_ends[i + 1]]
        learnt = target < 0
        return Encoded(source, np.where(learnt, ~target, target), learnt) if learnt.any() else Encoded(source, target)

    def source(self, i: int) -> np.ndarray:
        return self.example(i).source

    def target(self, i: int) -> np.ndarray:
        return self.example(i).target

    @property
    def source_lengths(self) -> np.ndarray:
        return np.diff(self.source_ends)

    @property
    def target_lengths(self) -> np.ndarray:
        return np.diff(self.target_ends)


_NOTHING = Encoded(np.zeros(0, np.int32), np.zeros(0, np.int32))
_ARRAYS = ("source_tokens", "source_ends", "target_tokens", "target_ends")
_INDEX = "index.txt"  # the counts and the arrays' checksums in its second line, whose own checksum is the first


def tokenize(source: Source, where: str, data: Data, tokenizer: Tokenizer, format: Format) -> list[Tokenized]:
    """The source's token ids under each of its templates, from the cache or made now.

    Raises UserError for records that cannot be read or rendered, and where more is dropped, cut or
    unknown than the config's limits allow.
    """
    made = []
    cache = _cache(data)
    with hosts.first_then_others():  # what is downloaded or made once, the others find, where they share a disk
        digest = sources.digest(source, where)
        for template in source.template:
            folder = cache / _key(digest, template, data, tokenizer, format)
            if not os.path.lexists(folder):
                _write(folder, source, where, template, data, tokenizer, format)
            made.append(_open(folder, sources.name_of(source), template, digest))
    for item in made:
        _check_limits(item, data)
    return made


def _cache(data: Data) -> Path:
    """The folder of all caches, which must be local: they are memory-mapped."""
    folder = files.locate_local(data.cache_dir, "config.data.cache_dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"config.data.cache_dir: cannot make {folder}: {error.strerror}; name another") from error
    return folder


def _key(digest: str, template: str, data: Data, tokenizer: Tokenizer, format: Format) -> str:
    parts = (digest, template, tokenizer.digest(), format.key(data), _code())
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _code() -> str:
    """A hash of the code that turns records into tokens."""
    names = ("sources", "templates", "tokenized", "tokenizer", "builtin", "formats", "encoding", "chat")
    files = (Path(__file__).with_name(f"{name}.py") for name in names)
    return hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=8).hexdigest()


def _write(
    folder: Path, source: Source, where: str, template: str, data: Data, tokenizer: Tokenizer, format: Format
) -> None:
    try:
        with files.new_folder(folder.parent, ".part-") as part:
            counts = Counts()
            _write_tokens(part, _encode(source, where, template, data, tokenizer, format, counts))
            checksums = {array: _checksum(_map(part, array)) for array in _ARRAYS}
            content = json.dumps({"counts": asdict(counts), "checksums": checksums})
            (part / _INDEX).write_text(f"{zlib.crc32(content.encode())}\n{content}\n", encoding="utf-8")
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


def _write_tokens(folder: Path, examples: Iterable[Encoded | None]) -> None:
    ends: tuple[list[int], list[int]] = ([0], [0])
    with (folder / "source_tokens.bin").open("wb") as sources, (folder / "target_tokens.bin").open("wb") as targets:
        for example in examples:
            source, target, learnt = example or _NOTHING
            if learnt is not None:
                target = np.where(learnt, ~target, target)
            for tokens, end, file in zip((source, target), ends, (sources, targets), strict=True):
                file.write(tokens.astype(np.int32).tobytes())
                end.append(end[-1] + len(tokens))
    np.asarray(ends[0], np.int64).tofile(folder / "source_ends.bin")
    np.asarray(ends[1], np.int64).tofile(folder / "target_ends.bin")


def _open(folder: Path, name: str, template: str, digest: str) -> Tokenized:
    try:
        if not all((folder / name).is_file() for name in (_INDEX, *map("{}.bin".format, _ARRAYS))):
            raise FileNotFoundError  # or what is there is a pipe, which would never end
        checksum, content = (folder / _INDEX).read_text(encoding="utf-8").splitlines()
        arrays = {array: _map(folder, array) for array in _ARRAYS}
        whole = checksum == str(zlib.crc32(content.encode()))
        index = json.loads(content) if whole else {}
        whole = whole and all(_checksum(arrays[array]) == index["checksums"][array] for array in _ARRAYS)
    except (OSError, ValueError):
        whole = False
    if not whole:
        raise UserError(f"the cached data set {folder} is damaged; remove it, and it is made again")
    return Tokenized(name, template, Counts(**index["counts"]), **arrays, digest=digest)


def _map(folder: Path, array: str) -> np.ndarray:
    file, dtype = folder / f"{array}.bin", np.int64 if array.endswith("ends") else np.int32
    return np.memmap(file, dtype, "r") if file.stat().st_size else np.zeros(0, dtype)


def _checksum(array: np.ndarray) -> int:
    checksum, content = 0, array.data.cast("B") if len(array) else b""
    for start in range(0, len(content), 1 << 24):
        checksum = zlib.crc32(content[start : start + (1 << 24)], checksum)
    return checksum


def _encode(
    source: Source, where: str, template: str, data: Data, tokenizer: Tokenizer, format: Format, counts: Counts
) -> Iterator[Encoded | None]:
    """The tokens of every example, None for one that is dropped; counts as it goes."""
    records = iter(sources.read(source, where))
    with Bar(f"tokenizing {sources.name_of(source)}", unit="examples") as bar:
        while chunk := list(islice(records, _CHUNK)):
            examples = [templates.render(record, template) for record in chunk]
            yield from format.encode(examples, [record.where for record in chunk], data, tokenizer, counts)
            bar.update(len(chunk))


def _check_limits(item: Tokenized, data: Data) -> None:
    counts = item.counts
    tokens = max(counts.source_tokens + counts.target_tokens, 1)
    dropped = f"{counts.empty_completion} with an empty completion, {counts.too_long} too long"
    if not counts.kept:
        raise UserError(f"data set {item.name}: no example is left of {counts.examples}: {dropped}")
    vanished = counts.vanished
    shares = (
        ("max_dropped", counts.dropped, counts.examples, f"examples dropped ({dropped})"),
        ("max_truncated", counts.truncated, counts.examples, "examples truncated"),
        ("max_unknown", counts.unknown_tokens, tokens, "tokens unknown to the tokenizer"),
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


def shown_characters(counted: Mapping[str, int], most: int = 5) -> str:
    """Characters and how often each occurs, the most frequent ones first."""
    ranked = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{character!a} {number} times" for character, number in ranked[:most]]
    return ", ".join([*shown, *([f"{len(ranked) - most} others"] if len(ranked) > most else [])])


def prompts_and_completions(items: Iterable[Source], where: str) -> Iterator[str]:
    """All texts of some sources, for training a tokenizer."""
    for i, source in enumerate(items):
        for record in sources.read(source, f"{where}.{i}"):
            for template in source.template:
                yield from (turn.text for turn in templates.render(record, template).turns)


def eligible(tokenized: Sequence[Tokenized]) -> np.ndarray:
    """Indices of the examples that every template of a source kept."""
    kept = np.ones(tokenized[0].counts.examples, bool)
    for item in tokenized:
        kept &= item.target_lengths > 0
    return np.flatnonzero(kept)
