"""A data set as token ids on disk: made once for a key, then memory-mapped.

The key covers the data's bytes, the template, the tokenizer, the lengths and the code that made it, so
that nothing stale is ever read. A folder is written beside its place and renamed: whole or absent.
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

from jax_it.config import Data, Source
from jax_it.data import sources, templates
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError

_CHUNK = 1000  # records that the tokenizer takes at a time


@dataclass
class Counts:
    """What became of a source's examples under one template. Tokens are counted before anything is cut."""

    examples: int = 0
    empty_completion: int = 0  # dropped: nothing to learn
    too_long: int = 0  # dropped, with truncate="drop"
    truncated: int = 0  # on either side
    truncated_source: int = 0
    truncated_target: int = 0
    source_tokens: int = 0
    target_tokens: int = 0
    unknown_tokens: int = 0

    @property
    def dropped(self) -> int:
        return self.empty_completion + self.too_long

    @property
    def kept(self) -> int:
        return self.examples - self.dropped


@dataclass(frozen=True)
class Tokenized:
    """One source under one template: example i's tokens, both with the end mark; length 0 if it was dropped."""

    name: str
    template: str
    counts: Counts
    source_tokens: np.ndarray  # all examples' tokens, one after another
    source_ends: np.ndarray  # int64 [examples + 1]: example i is tokens[ends[i]:ends[i + 1]]
    target_tokens: np.ndarray
    target_ends: np.ndarray

    def source(self, i: int) -> np.ndarray:
        return self.source_tokens[self.source_ends[i] : self.source_ends[i + 1]]

    def target(self, i: int) -> np.ndarray:
        return self.target_tokens[self.target_ends[i] : self.target_ends[i + 1]]

    @property
    def source_lengths(self) -> np.ndarray:
        return np.diff(self.source_ends)

    @property
    def target_lengths(self) -> np.ndarray:
        return np.diff(self.target_ends)


_ARRAYS = ("source_tokens", "source_ends", "target_tokens", "target_ends")


def tokenize(source: Source, where: str, data: Data, tokenizer: Tokenizer) -> list[Tokenized]:
    """The source's token ids under each of its templates, from the cache or made now.

    Raises UserError for records that cannot be read or rendered, and where more is dropped, cut or
    unknown than the config's limits allow.
    """
    digest = sources.digest(source, where)
    made = []
    for template in source.template:
        folder = Path(data.cache_dir).expanduser() / _key(digest, template, data, tokenizer)
        if not (folder / "counts.json").is_file():
            _write(folder, source, where, template, data, tokenizer)
        made.append(_open(folder, sources.name_of(source), template))
    for item in made:
        _check_limits(item, data)
    return made


def _key(digest: str, template: str, data: Data, tokenizer: Tokenizer) -> str:
    parts = (digest, template, tokenizer.digest(), data.source_length, data.target_length, data.truncate, _code())
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _code() -> str:
    """A hash of the code that turns records into tokens."""
    names = ("sources", "templates", "tokenized", "tokenizer", "builtin")
    files = (Path(__file__).with_name(f"{name}.py") for name in names)
    return hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=8).hexdigest()


def _write(folder: Path, source: Source, where: str, template: str, data: Data, tokenizer: Tokenizer) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=folder.parent, ignore_cleanup_errors=True) as name:
            part = Path(name)
            counts = Counts()
            _write_tokens(part, _encode(source, where, template, data, tokenizer, counts))
            (part / "counts.json").write_text(json.dumps(asdict(counts)))
            try:
                part.rename(folder)
            except OSError:  # another process was faster, with the same content
                if not (folder / "counts.json").is_file():
                    raise
    except OSError as error:
        raise UserError(
            f"config.data.cache_dir: cannot write {folder}: {error.strerror or error}; free space or name another"
        ) from error


def _write_tokens(folder: Path, pairs: Iterable[tuple[list[int], list[int]]]) -> None:
    ends: tuple[list[int], list[int]] = ([0], [0])
    with (folder / "source_tokens.bin").open("wb") as sources, (folder / "target_tokens.bin").open("wb") as targets:
        for pair in pairs:
            for tokens, end, file in zip(pair, ends, (sources, targets), strict=True):
                file.write(np.asarray(tokens, np.int32).tobytes())
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
    source: Source, where: str, template: str, data: Data, tokenizer: Tokenizer, counts: Counts
) -> Iterator[tuple[list[int], list[int]]]:
    """Source and target ids of every example, empty for one that is dropped; counts as it goes."""
    records = iter(sources.read(source, where))
    with tqdm(desc=f"tokenizing {sources.name_of(source)}", unit=" examples", disable=None, leave=False) as bar:
        while chunk := list(islice(records, _CHUNK)):
            examples = [templates.render(record, template) for record in chunk]
            prompts = tokenizer.encode([example.prompt for example in examples])
            # Blanks alone are no completion, also where the tokenizer has tokens for them.
            completions = tokenizer.encode([example.completion.strip() and example.completion for example in examples])
            for record, prompt, completion in zip(chunk, prompts, completions, strict=True):
                yield _format(prompt, completion, record.where, data, tokenizer, counts)
            bar.update(len(chunk))


def _format(
    prompt: list[int], completion: list[int], where: str, data: Data, tokenizer: Tokenizer, counts: Counts
) -> tuple[list[int], list[int]]:
    """Both sides with the end mark, cut to their lengths as the config says. A cut side keeps its end mark."""
    counts.examples += 1
    counts.source_tokens += len(prompt) + 1
    counts.target_tokens += len(completion) + 1
    if tokenizer.unknown is not None:
        counts.unknown_tokens += prompt.count(tokenizer.unknown) + completion.count(tokenizer.unknown)
    if not completion:
        counts.empty_completion += 1
        return [], []
    too_long = len(prompt) >= data.source_length, len(completion) >= data.target_length
    if any(too_long):
        if data.truncate == "refuse":
            raise UserError(
                f"{where}: {len(prompt) + 1} source and {len(completion) + 1} target tokens do not fit "
                f"{data.source_length} and {data.target_length}; raise them, or choose another config.data.truncate"
            )
        if data.truncate == "drop":
            counts.too_long += 1
            return [], []
        counts.truncated += 1
        counts.truncated_source += too_long[0]
        counts.truncated_target += too_long[1]
    room = data.source_length - 1
    prompt = prompt[-room:] if data.truncate == "start" else prompt[:room]
    return [*prompt, tokenizer.end], [*completion[: data.target_length - 1], tokenizer.end]


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
                example = templates.render(record, template)
                yield from (example.prompt, example.completion)


def eligible(tokenized: Sequence[Tokenized]) -> np.ndarray:
    """Indices of the examples that every template of a source kept."""
    kept = np.ones(tokenized[0].counts.examples, bool)
    for item in tokenized:
        kept &= item.target_lengths > 0
    return np.flatnonzero(kept)
