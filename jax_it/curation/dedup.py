"""`jax-it data dedup`: drops records that say the same as one that is kept.

Three methods, of which the last two include the first:

- exact: the folded texts are equal (by a 128-bit hash).
- near: the sets of their word 5-grams have a Jaccard similarity of `threshold` or more. Candidates are found by
  MinHash: 14 bands of 8 hashes each, so a pair of similarity s is found with probability 1 - (1 - s^8)^14: 0.64 at
  0.72, 0.93 at 0.8, 0.9998 at 0.9. They are confirmed by the sets themselves.
- semantic: the cosine of a model's mean hidden states is `semantic_threshold` or more; every pair is compared.

Records are taken in the order of preference that `keep` says, and each is dropped if it duplicates one that was kept.
So a dropped record is always a duplicate of the kept record it is listed with, and not the end of a chain of others.

In memory are some 100 bytes for each record; hashes and n-grams are in files of the temporary folder.
"""

import bisect
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from jax_it.curation import texts
from jax_it.curation.input import Chunk, Input
from jax_it.curation.settings import Dedup
from jax_it.curation.stage import Dropped, Kept, Outcome, Plan, invalid, require
from jax_it.data import templates
from jax_it.data.records import InvalidRecord, Record
from jax_it.errors import UserError

NGRAM = 5  # words
BANDS, ROWS = 14, 8  # of MinHash: a band is that many hashes
METHODS = ("exact", "near", "semantic")
LARGEST = 10  # groups in the report
SEMANTIC_BLOCK = 1024  # records that are compared at a time
_MULTIPLIERS = np.random.default_rng(0).integers(1, 1 << 63, 16, dtype=np.uint64) | np.uint64(1)


class _Signed(NamedTuple):
    """What is needed of the N records of a chunk."""

    valid_N: np.ndarray
    exact_N2: np.ndarray  # the 128-bit hash
    score_N: np.ndarray  # by which `keep` prefers records
    bands_NB: np.ndarray  # a hash for each band; of no columns unless the method is "near"
    sizes_N: np.ndarray  # of the sets of n-grams
    ngrams: np.ndarray  # uint32, of all records one after another, sorted within each
    places: list[tuple[str, list[int]]]  # "file, line" and the numbers of the records that follow each other


def plan(settings: Dedup, input: Input) -> Plan:
    _check(settings)
    groups = find(settings, input)
    return Plan(_apply, groups.of_chunk, groups.report(), groups.text())


def _check(settings: Dedup) -> None:
    kind, _, field = settings.keep.partition(":")
    if settings.keep not in ("first", "longest") and not (kind == "best" and field):
        raise UserError(f"keep: {settings.keep!r} is not first, longest or best:FIELD")
    for name in ("threshold", "semantic_threshold"):
        if not 0 < getattr(settings, name) <= 1:
            raise UserError(f"{name}: {getattr(settings, name)} is not above 0 and at most 1")
    if (settings.method == "semantic") != bool(settings.model):
        raise UserError("method 'semantic' and a model need each other; set both or neither")
    if settings.method == "near":
        require("datasketch", "finding near-duplicates")


@dataclass
class Groups:
    """Which records are duplicates of which: of N records, in the order of the input."""

    kept_N: np.ndarray  # the number of the record that is kept in its place; its own number where it is kept itself
    method_N: np.ndarray  # an index into METHODS, for those that are dropped
    similarity_N: np.ndarray
    place: Callable[[int], str]  # "data.jsonl, line 7" of a record's number

    def drop(self, i: int, kept: int, method: str, similarity: float) -> None:
        self.kept_N[i], self.method_N[i], self.similarity_N[i] = kept, METHODS.index(method), similarity

    def resolve(self) -> None:
        """Let exact duplicates of a record that was dropped later be duplicates of the one that is kept."""
        for values in (self.method_N, self.similarity_N, self.kept_N):
            values[:] = np.where(self.kept_N[self.kept_N] == self.kept_N, values, values[self.kept_N])

    def of_chunk(self, chunk: Chunk) -> dict[int, tuple[str, dict[str, Any]]]:
        """Return the reason and details for each dropped record of a chunk, by its index there."""
        here = np.arange(chunk.start, chunk.start + chunk.size)
        return {int(i - chunk.start): self._why(int(i)) for i in here[self.kept_N[here] != here]}

    def _why(self, i: int) -> tuple[str, dict[str, Any]]:
        method = METHODS[self.method_N[i]]
        details: dict[str, Any] = {"duplicate_of": self.place(int(self.kept_N[i]))}
        if method != "exact":
            details["similarity"] = round(float(self.similarity_N[i]), 4)
        return f"{method} duplicate", details

    def report(self) -> dict[str, Any]:
        dropped = np.flatnonzero(self.kept_N != np.arange(len(self.kept_N)))
        numbers = Counter(METHODS[method] for method in self.method_N[dropped])
        heads, sizes = np.unique(self.kept_N[dropped], return_counts=True)
        largest = np.lexsort((heads, -sizes))[:LARGEST]
        return {
            "duplicates": {method: numbers[method] for method in METHODS if numbers[method]},
            "groups": len(heads),
            "largest_groups": [{"kept": self.place(int(heads[i])), "records": int(sizes[i]) + 1} for i in largest],
        }

    def text(self) -> str:
        found = self.report()
        lines = [f"{sum(found['duplicates'].values())} duplicates in {found['groups']} groups; the largest:"]
        lines += [f"  {group['records']} records like {group['kept']}" for group in found["largest_groups"]]
        return "\n".join(lines) if found["groups"] else "no duplicates"


def _apply(chunk: Chunk) -> list[Outcome]:
    found: list[Outcome] = []
    for number, record in enumerate(chunk.records()):
        if number in chunk.note:
            found.append(Dropped(*chunk.note[number]))
            continue
        try:
            templates.render(record, chunk.template)
            found.append(Kept(record.fields))
        except InvalidRecord as error:
            found.append(invalid(error))
    return found


def find(settings: Dedup, input: Input) -> Groups:
    """Return the groups of duplicates among the records that can be rendered."""
    groups, ranked, store = _exact_groups(settings, input)
    if settings.method == "near":
        _near(groups, ranked, store, settings.threshold)
    if settings.method == "semantic":
        _semantic(groups, ranked, settings, input)
    store.close()
    groups.resolve()
    return groups


def components(settings: Dedup, input: Input) -> np.ndarray:
    """Return for each record [N] the number of one of its group: near-duplicates are in one, however many between."""
    groups, ranked, store = _exact_groups(settings, input)
    parent_N = groups.kept_N

    def root(i: int) -> int:
        while parent_N[i] != i:
            parent_N[i] = parent_N[parent_N[i]]
            i = int(parent_N[i])
        return i

    candidates = _Candidates(ranked, store)
    every = np.ones(len(ranked), bool)
    for rank in candidates.ranks.tolist():
        i = int(ranked[rank])
        for j in ranked[candidates.before(rank, every)].tolist():
            if root(i) != root(j) and _similarity(store, i, j, settings.threshold) >= settings.threshold:
                parent_N[root(i)] = root(j)
    store.close()
    return np.array([root(i) for i in range(len(parent_N))], np.int64)


def _exact_groups(settings: Dedup, input: Input) -> tuple[Groups, np.ndarray, "_Store"]:
    """Return the groups of equal texts, the kept records in their order of preference, and what is known of each."""
    folder = Path(tempfile.mkdtemp(dir=input.folder))  # a recipe may deduplicate twice
    near = settings.method == "near"
    store = _Store(folder, BANDS if near else 0)
    with store:
        for signed in input.map(partial(_sign, settings)):
            store.add(signed)
    number = store.number
    groups = Groups(np.arange(number), np.zeros(number, np.int8), np.ones(number, np.float32), store.place)
    # Those that are preferred come first; of equals the one that comes first in the input.
    ranked = np.argsort(-store.read("score", np.float64), kind="stable")
    ranked = ranked[store.read("valid", np.bool_)[ranked]]
    return groups, _exact(groups, ranked, store.read("exact", np.uint64).reshape(-1, 2)), store


# Hashes of each record, on the workers.


class _WordHashes(dict[str, int]):
    """The 64-bit hashes of words, remembered; emptied where it would hold too many."""

    def __missing__(self, word: str) -> int:
        if len(self) >= 1 << 20:
            self.clear()
        found = self[word] = xxhash.xxh3_64_intdigest(word.encode())
        return found


_HASHES = _WordHashes()


def _sign(settings: Dedup, chunk: Chunk) -> _Signed:
    valid, exact, score, ngrams = [], [], [], []
    places: list[tuple[str, list[int]]] = []
    near = settings.method == "near"
    for record in chunk.records():
        file, _, number = record.where.rpartition(" ")
        if not places or places[-1][0] != file:
            places.append((file, []))
        places[-1][1].append(int(number))
        try:
            example = templates.render(record, chunk.template)
        except InvalidRecord:
            valid.append(False)
            exact.append(bytes(16))
            score.append(0.0)
            ngrams.append(np.zeros(0, np.uint32))
            continue
        folded = texts.fold(texts.part_of(example, settings.on))
        valid.append(True)
        exact.append(xxhash.xxh3_128_digest(folded.encode()))
        score.append(_score(settings.keep, record, example))
        ngrams.append(ngrams_of(folded) if near else np.zeros(0, np.uint32))
    return _Signed(
        np.array(valid),
        np.frombuffer(b"".join(exact), np.uint64).reshape(-1, 2),
        np.array(score),
        _bands(ngrams) if near else np.zeros((len(ngrams), 0), np.uint64),
        np.array([len(found) for found in ngrams], np.int64),
        np.concatenate(ngrams),
        places,
    )


def _score(keep: str, record: Record, example: templates.Example) -> float:
    if keep == "first":
        return 0.0
    if keep == "longest":
        return float(sum(len(turn.text) for turn in example.turns))
    field = keep.partition(":")[2]
    value = record.fields.get(field)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise UserError(f"{record.where}: field {field!r}, which keep={keep!r} compares, is not a number")
    return float(value)


def ngrams_of(folded: str) -> np.ndarray:
    """Return the set of 32-bit hashes of a text's word 5-grams, sorted; of fewer words, of them all.

    Two different n-grams of 200 have the same hash once in 100,000 texts.
    """
    words = texts.words(folded)
    hashes = np.fromiter(map(_HASHES.__getitem__, words), np.uint64, len(words))
    size = max(len(words) - NGRAM + 1, 1)
    if not words:  # nothing but punctuation
        return np.array([xxhash.xxh3_64_intdigest(folded.encode()) >> 32], np.uint32)
    mixed = np.zeros(size, np.uint64)
    for i in range(min(NGRAM, len(words))):
        mixed += hashes[i : i + size] * _MULTIPLIERS[i]
    return np.unique((mixed >> np.uint64(32)).astype(np.uint32))


def _bands(ngrams: list[np.ndarray]) -> np.ndarray:
    """Return the hash of each MinHash band of each record, [N, BANDS]."""
    from datasketch import MinHash

    hashes = [
        m.hashvalues for m in MinHash.generator((s.tolist() for s in ngrams), num_perm=BANDS * ROWS, hashfunc=int)
    ]
    hashes_NBR = np.array(hashes, np.uint64).reshape(-1, BANDS, ROWS)
    mixed_NB = (hashes_NBR * _MULTIPLIERS[:ROWS]).sum(-1, dtype=np.uint64)
    return mixed_NB ^ (mixed_NB >> np.uint64(32))


class _Store:
    """What the workers found for all records, in files."""

    def __init__(self, folder: Path, bands: int):
        self._folder, self._bands = folder, bands
        self._streams: dict[str, Any] = {}
        self._places: list[tuple[int, str]] = []  # the first record's number and "file, line"
        self.number = 0
        self._offsets = np.zeros(1, np.int64)

    def __enter__(self) -> "_Store":
        names = ["valid", "exact", "score", "sizes", "ngrams", "lines", *(f"band{i}" for i in range(self._bands))]
        self._streams = {name: (self._folder / name).open("wb") for name in names}
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._streams.values():
            stream.close()
        self._offsets = np.concatenate([[0], np.cumsum(self.read("sizes", np.int64))])
        self._ngrams = os.open(self._folder / "ngrams", os.O_RDONLY)
        self._lines = np.memmap(self._folder / "lines", np.int64, "r") if self.number else np.zeros(0, np.int64)

    def close(self) -> None:
        """Close the n-grams; places can still be read."""
        os.close(self._ngrams)

    def add(self, signed: _Signed) -> None:
        arrays = {"valid": signed.valid_N, "exact": signed.exact_N2, "score": signed.score_N, "sizes": signed.sizes_N}
        arrays |= {"ngrams": signed.ngrams}
        arrays |= {f"band{i}": signed.bands_NB[:, i] for i in range(self._bands)}
        for name, array in arrays.items():
            self._streams[name].write(np.ascontiguousarray(array).data)
        for file, numbers in signed.places:
            if not self._places or self._places[-1][1] != file:
                self._places.append((self.number, file))
            self._streams["lines"].write(np.array(numbers, np.int64).data)
            self.number += len(numbers)

    def read(self, name: str, dtype: Any) -> np.ndarray:
        return np.fromfile(self._folder / name, dtype)

    def ngrams(self, i: int) -> np.ndarray:
        begin, end = self._offsets[i : i + 2].tolist()
        return np.frombuffer(os.pread(self._ngrams, (end - begin) * 4, begin * 4), np.uint32)

    def size(self, i: int) -> int:
        return int(self._offsets[i + 1] - self._offsets[i])

    def place(self, i: int) -> str:
        file = self._places[bisect.bisect_right(self._places, i, key=lambda place: place[0]) - 1][1]
        return f"{file} {self._lines[i]}"


# Groups, in this process.


def _exact(groups: Groups, ranked: np.ndarray, exact_N2: np.ndarray) -> np.ndarray:
    """Group equal texts; return the records that are kept, in their order of preference."""
    hashes = exact_N2[ranked]
    order = np.lexsort((np.arange(len(ranked)), hashes[:, 1], hashes[:, 0]))
    same = np.concatenate([[False], (hashes[order[1:]] == hashes[order[:-1]]).all(1)]) if len(order) else order > 0
    first = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
    groups.kept_N[ranked[order]] = ranked[order[first]]
    kept = np.ones(len(ranked), bool)
    kept[order[same]] = False
    return ranked[kept]


def _near(groups: Groups, ranked: np.ndarray, store: _Store, threshold: float) -> None:
    """Group similar texts, by their n-grams."""
    kept = np.ones(len(ranked), bool)
    candidates = _Candidates(ranked, store)
    for rank in candidates.ranks.tolist():
        i = int(ranked[rank])
        best, best_rank = 0.0, -1
        for other in candidates.before(rank, kept):
            similarity = _similarity(store, i, int(ranked[other]), threshold)
            if similarity >= threshold and similarity > best:
                best, best_rank = similarity, other
        if best_rank >= 0:
            kept[rank] = False
            groups.drop(i, int(ranked[best_rank]), "near", best)


def _similarity(store: _Store, i: int, j: int, threshold: float) -> float:
    """Return the Jaccard similarity of two records, or 0 where their sizes alone put it below the threshold."""
    smaller, larger = sorted((store.size(i), store.size(j)))
    if smaller < threshold * larger:
        return 0.0
    shared = len(np.intersect1d(store.ngrams(i), store.ngrams(j), assume_unique=True))
    return shared / (smaller + larger - shared)


class _Candidates:
    """Which of the ranked records share a MinHash band: only those in a bucket of two or more are held."""

    def __init__(self, ranked: np.ndarray, store: _Store):
        involved = np.zeros(len(ranked), bool)
        self._bands: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for shared, _ in self._buckets(ranked, store):
            involved[shared] = True
        self.ranks = np.flatnonzero(involved)
        index = self._index = np.cumsum(involved, dtype=np.int32) - 1  # of a rank among `ranks`
        for shared, begins in self._buckets(ranked, store):
            at = np.full(len(self.ranks), -1, np.int32)  # where a record is in `shared`
            at[index[shared]] = np.arange(len(shared))
            self._bands.append((at, shared, begins))

    def before(self, rank: int, kept: np.ndarray) -> list[int]:
        """Return the ranks before this one that share a bucket with it and are kept."""
        found: set[int] = set()
        for at, shared, begins in self._bands:
            place = at[self._index[rank]]
            if place >= 0:
                earlier = shared[begins[place] : place]
                found.update(earlier[kept[earlier]].tolist())
        return sorted(found)

    @staticmethod
    def _buckets(ranked: np.ndarray, store: _Store) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield for each band the ranks in buckets of two or more, bucket by bucket, and where its bucket begins."""
        for band in range(BANDS):
            hashes = store.read(f"band{band}", np.uint64)[ranked]
            order = np.argsort(hashes, kind="stable")
            hashes = hashes[order]
            same = hashes[1:] == hashes[:-1]
            shared = np.zeros(len(hashes), bool)
            shared[1:] |= same
            shared[:-1] |= same
            first = np.append(True, ~same)[: len(shared)][shared]
            order = order[shared].astype(np.int32)
            yield order, np.maximum.accumulate(np.where(first, np.arange(len(order)), 0)).astype(np.int32)


def _semantic(groups: Groups, ranked: np.ndarray, settings: Dedup, input: Input) -> None:
    """Group texts of similar meaning, by the cosine of a model's mean states."""
    from jax_it.curation import embeddings  # the model's code, which other methods and the workers do not need

    encoder = embeddings.Encoder(settings.model)
    file = Path(tempfile.mkdtemp(dir=input.folder)) / "states"
    with file.open("wb") as stream:
        for states_ND in encoder.states(texts.of_records(input, settings.on)):
            stream.write(states_ND.data)
    states_ND = np.memmap(file, np.float32, "r").reshape(-1, encoder.size)
    kept: list[int] = []
    for begin in range(0, len(ranked), SEMANTIC_BLOCK):
        block = ranked[begin : begin + SEMANTIC_BLOCK]
        mine_BD = states_ND[block]
        best_B, best_rank_B = np.full(len(block), -1.0, np.float32), np.zeros(len(block), np.int64)
        for start in range(0, len(kept), SEMANTIC_BLOCK):
            those = np.array(kept[start : start + SEMANTIC_BLOCK])
            cosine_BK = mine_BD @ states_ND[those].T
            top_B = cosine_BK.argmax(1)
            cosine_B = cosine_BK[np.arange(len(block)), top_B]
            better = cosine_B > best_B
            best_B[better], best_rank_B[better] = cosine_B[better], those[top_B][better]
        within_BB = mine_BD @ mine_BD.T
        mine: list[int] = []  # of the block, those that are kept
        for row, i in enumerate(block.tolist()):
            best, of = float(best_B[row]), int(best_rank_B[row])
            if mine and within_BB[row, mine].max() > best:
                top = mine[int(within_BB[row, mine].argmax())]
                best, of = float(within_BB[row, top]), int(block[top])
            if best >= settings.semantic_threshold:
                groups.drop(i, of, "semantic", min(best, 1.0))
            else:
                mine.append(row)
        kept += block[mine].tolist()
