"""A data set as token ids on disk: made once for a key, then memory-mapped.

The key covers the data's bytes, the template, the tokenizer with its chat template, the format, the lengths
and the code that made it, so that nothing stale is ever read. A folder is written beside its place and
renamed: whole or absent.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jax_it import files, hosts
from jax_it.config import Data, Source
from jax_it.data import sources, templates
from jax_it.data.batches import Encoded
from jax_it.data.encoding import Counts
from jax_it.data.formats import Format
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError

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


def tokenize(source: Source, where: str, data: Data, tokenizer: Tokenizer, format: Format) -> list[Tokenized]:
    """The source's token ids under each of its templates, from the cache or made now.

    Raises UserError for records that cannot be read or rendered, and where more is dropped, cut or
    unknown than the config's limits allow.
    """
    made = []
    with hosts.first_then_others():  # what is downloaded or made once, the others find, where they share a disk
        digest = sources.digest(source, where)
        for template in source.template:
            folder = Path(data.cache_dir).expanduser() / _key(digest, template, data, tokenizer, format)
            if not (folder / "counts.json").is_file():
                _write(folder, source, where, template, data, tokenizer, format)
            made.append(_open(folder, sources.name_of(source), template))
    for item in made:
        _check_limits(item, data)
    return made


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
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=folder.parent, ignore_cleanup_errors=True) as name:
            part = Path(name)
            counts = Counts()
            _write_tokens(part, _encode(source, where, template, data, tokenizer, format, counts))
            (part / "counts.json").write_text(json.dumps(asdict(counts)))
            try:
                part.rename(folder)
            except OSError:  # another process was faster, with the same content
                if not (folder / "counts.json").is_file():
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


def _open(folder: Path, name: str, template: str) -> Tokenized:
    try:
        counts = Counts(**json.loads((folder / "counts.json").read_text()))
        arrays = {array: _map(folder / f"{array}.bin", np.int64 if "ends" in array else np.int32) for array in _ARRAYS}
        whole = all(arrays[f"{side}_ends"][-1] == len(arrays[f"{side}_tokens"]) for side in ("source", "target"))
    except (OSError, ValueError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"the cached data set {folder} is damaged; remove it, and it is made again")
    return Tokenized(name, template, counts, **arrays)


def _map(file: Path, dtype: type[np.integer]) -> np.ndarray:
    return np.memmap(file, dtype, "r") if file.stat().st_size else np.zeros(0, dtype)


def _encode(
    source: Source, where: str, template: str, data: Data, tokenizer: Tokenizer, format: Format, counts: Counts
) -> Iterator[Encoded | None]:
    """The tokens of every example, None for one that is dropped; counts as it goes."""
    records = iter(sources.read(source, where))
    with tqdm(desc=f"tokenizing {sources.name_of(source)}", unit=" examples", disable=None, leave=False) as bar:
        while chunk := list(islice(records, _CHUNK)):
            examples = [templates.render(record, template) for record in chunk]
            yield from format.encode(examples, [record.where for record in chunk], data, tokenizer, counts)
            bar.update(len(chunk))


def _check_limits(item: Tokenized, data: Data) -> None:
    counts = item.counts
    tokens = max(counts.source_tokens + counts.target_tokens, 1)
    dropped = f"{counts.empty_completion} with an empty completion, {counts.too_long} too long"
    shares = (
        ("max_dropped", counts.dropped, counts.examples, f"examples dropped ({dropped})"),
        ("max_truncated", counts.truncated, counts.examples, "examples truncated"),
        ("max_unknown", counts.unknown_tokens, tokens, "tokens unknown to the tokenizer"),
    )
    for limit, number, of, what in shares:
        if number / of > getattr(data, limit):
            raise UserError(
                f"data set {item.name}: {number} of {of} {what}, {number / of:.1%}; mend the data, "
                f"or allow it with config.data.{limit}={math.ceil(1000 * number / of) / 1000} or more"
            )
    if not counts.kept:
        raise UserError(f"data set {item.name}: no example is left of {counts.examples}: {dropped}")


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
