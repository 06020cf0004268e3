"""`jax-it data sample`: some of the records, at random, by task or far apart; or one part of a split.

The choice depends on the records and the seed alone. The parts of a split share no near-duplicates that MinHash finds:
records are joined into groups by every pair that `dedup` would call near-duplicates, and a group is in one part.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import xxhash

from jax_it.curation import dedup, texts
from jax_it.curation.input import Chunk, Input
from jax_it.curation.settings import Dedup, Sample
from jax_it.curation.stage import Dropped, Kept, Outcome, Plan, invalid
from jax_it.data import templates
from jax_it.data.records import InvalidRecord
from jax_it.errors import UserError
from jax_it.metrics import characters

DIMENSIONS = 256  # of the vectors of hashed words


class _Read(NamedTuple):
    valid_N: np.ndarray
    strata: list[str]  # the value of the field to stratify by
    vectors_ND: np.ndarray  # of hashed words; of no columns where they are not needed


def plan(settings: Sample, input: Input) -> Plan:
    _check(settings)
    if settings.split:
        return _part(settings, input)
    valid, strata, vectors = _read_all(settings, input)
    names = list(dict.fromkeys(np.array(strata, object)[valid].tolist()))
    stratum_N = np.array([names.index(name) if ok else -1 for name, ok in zip(strata, valid, strict=True)], np.int64)
    sizes = np.bincount(stratum_N[valid], minlength=len(names))
    wanted = settings.number or round(settings.share * int(valid.sum()))
    if wanted > valid.sum():
        raise UserError(f"--number: {wanted} records are wanted, and there are {int(valid.sum())}; lower it")
    order = _shuffled(len(valid), settings.seed)
    chosen = np.zeros(len(valid), bool)
    radius = 0.0
    for stratum, quota in enumerate(quotas(sizes, wanted)):
        members = order[stratum_N[order] == stratum]
        if settings.diverse and quota:
            members, distance = k_centers(vectors, members, quota)
            radius = max(radius, distance)
        chosen[members[:quota]] = True
    report: dict[str, Any] = {"taken": int(chosen.sum())}
    if settings.stratify:
        report["by_value"] = {
            name: {"records": int(size), "taken": int(chosen[stratum_N == i].sum())}
            for i, (name, size) in enumerate(zip(names, sizes, strict=True))
        }
    if settings.diverse:
        report["farthest"] = round(radius, 4)  # the cosine distance of the record that is farthest from all taken ones
    return Plan(_Take("not in the sample"), partial(_of_chunk, chosen), report)


def _check(settings: Sample) -> None:
    given = [name for name in ("number", "share", "split") if getattr(settings, name)]
    if len(given) != 1:
        raise UserError("sample: give one of --number, --share and --split")
    if settings.number < 0 or not 0 <= settings.share <= 1:
        raise UserError("sample: --number must be 1 or more, and --share from 0 to 1")
    if settings.split and (settings.stratify or settings.diverse):
        raise UserError("--split excludes --stratify and --diverse; leave them out")
    if settings.model and not settings.diverse:
        raise UserError("--model is for --diverse; add that or leave it out")
    held_out = settings.validation + settings.test
    if not (settings.validation >= 0 and settings.test >= 0 and held_out < 1):
        raise UserError("--validation and --test must not be negative, and leave some records to train on")


def _read_all(settings: Sample, input: Input) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Return which records can be rendered [N], the value of each to stratify by, and vectors [N, D]."""
    valid: list[np.ndarray] = []
    strata: list[str] = []
    hashed: list[np.ndarray] = []
    for found in input.map(partial(_read, settings)):
        valid.append(found.valid_N)
        strata += found.strata
        hashed.append(found.vectors_ND)
    vectors = np.concatenate(hashed)
    if settings.diverse and settings.model:
        from jax_it.curation import embeddings

        vectors = np.concatenate(list(embeddings.Encoder(settings.model).states(texts.of_records(input, settings.on))))
    return np.concatenate(valid), strata, vectors


def _read(settings: Sample, chunk: Chunk) -> _Read:
    valid, strata, vectors = [], [], []
    dimensions = DIMENSIONS if settings.diverse and not settings.model else 0
    for record in chunk.records():
        try:
            example = templates.render(record, chunk.template)
        except InvalidRecord:
            valid.append(False)
            strata.append("")
            vectors.append(np.zeros(dimensions, np.float32))
            continue
        valid.append(True)
        strata.append(str(record.fields.get(settings.stratify)) if settings.stratify else "")
        vectors.append(hashed_words(texts.part_of(example, settings.on)) if dimensions else np.zeros(0, np.float32))
    return _Read(np.array(valid, bool), strata, np.stack(vectors))


def hashed_words(text: str) -> np.ndarray:
    """Return a text as a vector [DIMENSIONS] of length 1: its words and pairs of words, hashed with signs."""
    words = characters(text)
    vector = np.zeros(DIMENSIONS, np.float32)
    for item in [*words, *(f"{one} {two}" for one, two in itertools.pairwise(words))]:
        code = xxhash.xxh3_64_intdigest(item.encode())
        vector[code % DIMENSIONS] += 1 if code >> 63 else -1
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def quotas(sizes: Sequence[int] | np.ndarray, number: int) -> list[int]:
    """Return how many of `number` each stratum gives: in proportion to its size, the largest remainders rounded up."""
    exact = np.array(sizes, float) * number / max(1, int(np.sum(sizes)))
    found = np.floor(exact).astype(int)
    rest = np.argsort(-(exact - found), kind="stable")[: number - int(found.sum())]
    found[rest] += 1
    return found.tolist()


def k_centers(vectors_ND: np.ndarray, members: np.ndarray, number: int) -> tuple[np.ndarray, float]:
    """Return `number` members, each the farthest from those before (k-centre greedy), beginning with the first.

    The second value is the cosine distance of the member that is then farthest from all of them: at most about twice
    what the best choice would leave (Gonzalez 1985, in the metric of chords).
    """
    mine_ND = vectors_ND[members]
    distance_N = np.full(len(members), np.inf, np.float32)
    chosen = [0]
    while True:
        distance_N = np.minimum(distance_N, 1 - mine_ND @ mine_ND[chosen[-1]])
        distance_N[chosen[-1]] = -1
        farthest = int(distance_N.argmax())
        if len(chosen) == number:
            return members[chosen], max(0.0, float(distance_N[farthest]))
        chosen.append(farthest)


def _shuffled(number: int, seed: int) -> np.ndarray:
    """Return the numbers below `number` in an order that depends on the seed."""
    return np.random.default_rng(seed).permutation(number)


def _part(settings: Sample, input: Input) -> Plan:
    """Plan one part of a split."""
    group_N = dedup.components(Dedup(on=settings.on), input)
    chosen_N = parts(group_N, settings.validation, settings.test, settings.seed)
    sizes = {name: int((chosen_N == i).sum()) for i, name in enumerate(PARTS)}
    report = {"records": sizes, "groups": len(np.unique(group_N))}
    text = ", ".join(f"{number} {name}" for name, number in sizes.items())
    treat = _Take("in another part of the split")
    return Plan(treat, partial(_of_chunk, chosen_N == PARTS.index(settings.split)), report, text)


PARTS = ("train", "validation", "test")


def parts(group_N: np.ndarray, validation: float, test: float, seed: int) -> np.ndarray:
    """Return the part of each record [N], an index into PARTS; a group is in one part.

    Groups come in random order, and one that no longer fits into a part goes to train.
    """
    groups, index_N, sizes = np.unique(group_N, return_inverse=True, return_counts=True)
    room = {2: round(test * len(group_N)), 1: round(validation * len(group_N))}
    part_G = np.zeros(len(groups), np.int8)
    for group in _shuffled(len(groups), seed).tolist():
        for part in room:
            if sizes[group] <= room[part]:
                room[part] -= int(sizes[group])
                part_G[group] = part
                break
    return part_G[index_N]


def _of_chunk(chosen_N: np.ndarray, chunk: Chunk) -> np.ndarray:
    return chosen_N[chunk.start : chunk.start + chunk.size]


@dataclass(frozen=True)
class _Take:
    """Keeps the records that a chunk's note says."""

    reason: str  # of those that are dropped

    def __call__(self, chunk: Chunk) -> list[Outcome]:
        found: list[Outcome] = []
        for record, taken in zip(chunk.records(), chunk.note, strict=True):
            try:
                templates.render(record, chunk.template)
                found.append(Kept(record.fields) if taken else Dropped(self.reason))
            except InvalidRecord as error:
                found.append(invalid(error))
        return found
