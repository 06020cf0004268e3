"""Find the texts of evaluation sets in training records, by shared n-grams of words; exact, without misses.

Two rules, as published: a text of an evaluation set is in a record if they share any 13 words in a row (GPT-3, and the
Language Model Evaluation Harness), or if 8 words in a row that they share cover more than half of the text (Tülu 3).
Words are those of `metrics.characters`: case and punctuation don't count, and each character of a script without
spaces is one. Words that a set's texts share because of their template neither match nor count.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jax_it import config, typed
from jax_it.config import Config, Source
from jax_it.curation.fields import texts_of
from jax_it.curation.input import Chunk, Input
from jax_it.curation.planned import Decisions, PerDecision
from jax_it.curation.settings import Decontaminate
from jax_it.curation.stage import Dropped, Kept, Outcome, Plan
from jax_it.data import sources
from jax_it.data.records import Fields, Record
from jax_it.errors import UserError
from jax_it.metrics import characters

ANY, COVERING = 13, 8  # words of an n-gram: one is enough, and several that cover more than half
COVERED = 0.5
# An n-gram belongs to the template of a set if it is in more distinct texts than this number and this share of them.
TEMPLATE_TEXTS, TEMPLATE_SHARE = 10, 0.05
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class EvalText(NamedTuple):
    """A text of an evaluation set."""

    set: str
    where: str  # "test.jsonl, line 3"
    field: str  # "question", "choices.0"
    text: str


class Match(NamedTuple):
    text: int  # index of the EvalText
    ngram: str  # the first 13 words that are shared, "" if there are none
    covered: float  # the share of its words that 8-grams cover, from 0 to 1

    def rules(self) -> str:
        """Return the rules that found it, for messages."""
        found = [f"{ANY}-gram"] if self.ngram else []
        return " and ".join(found + ([f"{COVERING}-grams cover {self.covered:.0%}"] if self.covered > COVERED else []))


@dataclass(frozen=True)
class _Table:
    """The n-grams of one length, without those of templates."""

    length: int
    hashes: np.ndarray  # [N] uint64, ascending
    starts: np.ndarray  # [N] where each begins in `Index.words`
    maybe: np.ndarray  # [2^k] bool: whether a hash with these highest bits exists


@dataclass(frozen=True)
class Index:
    """What `search` needs: the evaluation texts as one array of word ids, and tables of their n-grams."""

    texts: Sequence[EvalText]
    vocabulary: Mapping[str, int]
    words: np.ndarray  # [W] ids of all texts; -1 ends each
    text_of: np.ndarray  # [W] the text that each word belongs to
    counts: np.ndarray  # [W] bool: whether a word counts for the share that is covered
    own_words: np.ndarray  # [T] how many of each text do
    tables: tuple[_Table, _Table]  # of ANY, of COVERING
    short: frozenset[int]  # texts of fewer words than COVERING, which cannot be found


def plan(settings: Decontaminate, input: Input) -> Plan:
    if not settings.against:
        raise UserError("--against is missing; name the evaluation sets, such as test.jsonl")
    index = build_index(read(settings.against, settings.against_fields))
    decisions = Decisions(input)
    hits: list[tuple[str, list[Match]]] = []
    for start, places, found in input.map(partial(_search, index)):
        hits += [(where, matches) for where, matches in zip(places, found, strict=True) if matches]
        decisions.put(start, [[_shown(index, match) for match in matches] for matches in found])
    sets = report(index, hits)
    lines = [
        f"{name}: {one['hit']} of {one['items']} items are in the records"
        + (f"; {one['too_short']} are too short to be found" if one["too_short"] else "")
        for name, one in sets.items()
    ]
    return Plan(PerDecision(partial(_treat, settings.mark)), decisions, sets, "\n".join(lines))


def _search(index: Index, chunk: Chunk) -> tuple[int, list[str], list[list[Match]]]:
    records = list(chunk.records())
    return chunk.start, [record.where for record in records], search(index, [record.fields for record in records])


def _shown(index: Index, match: Match) -> dict[str, Any]:
    """Return a match for the record's `contaminated_by`, and for the list of dropped records."""
    text = index.texts[match.text]
    return {"set": text.set, "item": text.where, "field": text.field, "rule": match.rules()}


def _treat(mark: bool, record: Record, template: str, found: list[dict[str, Any]]) -> Outcome:
    if not found:
        return Kept(record.fields)
    if mark:
        return Kept({**record.fields, "contaminated_by": found}, ("contaminated",))
    return Dropped("contains a text of an evaluation set", {"contaminated_by": found})


def read(against: Sequence[str], fields: Sequence[str] = (), option: str = "--against") -> list[EvalText]:
    """Return the texts of evaluation sets: files, hub data sets (NAME or NAME:SPLIT) and recipes (FILE.py[:ARG]).

    Of a recipe these are the data of `eval.tasks` and of `data.eval`. `fields` are the names of the fields to take, all
    if there are none. Raises UserError for a set that cannot be read, and for one that lacks such a field.
    """
    found: list[EvalText] = []
    for name in against:
        for source, where in _sources(name, option):
            before = len(found)
            for record in sources.read(source, where):
                for field, text in texts_of(record.fields):
                    if not fields or field in fields or field.partition(".")[0] in fields:
                        found.append(EvalText(sources.name_of(source), record.where, field, text))
            if len(found) == before:
                what = f"no text in the fields {', '.join(fields)}" if fields else "no text"
                raise UserError(f"{where}: the records of {source.path} have {what}; name other fields or remove it")
    return found


def _sources(name: str, option: str) -> Iterator[tuple[Source, str]]:
    file, _, argument = name.partition(":")
    if file.endswith(".py"):
        recipe = typed.build(Config, config.read(name), "config")  # which names no model
        yield from ((source, f"{option} {name}, data.eval.{i}") for i, source in enumerate(recipe.data.eval))
        for i, task in enumerate(recipe.eval.tasks):
            if task.score == "lm_eval":
                raise UserError(
                    f"{option} {name}: the task {task.name} reads its data itself; name its data set, {option} NAME"
                )
            yield task.data, f"{option} {name}, eval.tasks.{i}.data"
        if not recipe.data.eval and not recipe.eval.tasks:
            raise UserError(f"{option} {name}: the recipe has no evaluation data; name files or data sets")
    elif argument and "/" in file and not argument.startswith("//"):
        yield Source(path=file, split=argument, format="datasets"), f"{option} {name}"
    else:
        yield Source(path=name), f"{option} {name}"


def build_index(texts: Sequence[EvalText]) -> Index:
    """Return the index of some evaluation texts. Texts that occur several times count as one for templates."""
    vocabulary: dict[str, int] = {}
    tokens: list[np.ndarray] = []
    first_of: dict[tuple[str, bytes], int] = {}  # of a set's texts with the same words
    distinct = np.zeros(len(texts), bool)
    for number, item in enumerate(texts):
        ids = [vocabulary.setdefault(word, len(vocabulary)) for word in characters(item.text)]
        tokens.append(np.array([*ids, -1], np.int32))
        distinct[number] = first_of.setdefault((item.set, tokens[-1].tobytes()), number) == number
    lengths = np.array([len(ids) - 1 for ids in tokens], np.int64)
    words = np.concatenate(tokens) if tokens else np.zeros(0, np.int32)
    text_of = np.repeat(np.arange(len(texts)), lengths + 1)
    names = {name: number for number, name in enumerate(dict.fromkeys(item.set for item in texts))}
    set_of = np.array([names[item.set] for item in texts], np.int64)
    any_table, _ = _table(words, text_of, set_of, distinct, ANY)
    covering_table, of_template = _table(words, text_of, set_of, distinct, COVERING)
    counts = (words >= 0) & ~of_template
    own_words = np.bincount(text_of[counts], minlength=len(texts))
    short = frozenset(np.flatnonzero(lengths < COVERING).tolist())
    return Index(texts, vocabulary, words, text_of, counts, own_words, (any_table, covering_table), short)


def _table(
    words: np.ndarray, text_of: np.ndarray, set_of: np.ndarray, distinct: np.ndarray, length: int
) -> tuple[_Table, np.ndarray]:
    """Return the n-grams without those of templates, and whether each word [W] is in one of a template."""
    starts = _whole(words, length)
    hashes = _hash(words, starts, length)
    of_template = np.zeros(len(starts), bool)
    for number in range(int(set_of.max(initial=-1)) + 1):
        here = set_of[text_of[starts]] == number
        texts = text_of[starts]
        pairs = np.unique(
            np.stack([hashes[here & distinct[texts]], texts[here & distinct[texts]].astype(np.uint64)], 1), axis=0
        )
        found, times = np.unique(pairs[:, 0], return_counts=True)
        most = max(TEMPLATE_TEXTS, TEMPLATE_SHARE * np.count_nonzero(distinct & (set_of == number)))
        of_template |= here & np.isin(hashes, found[times > most])
    covered = np.zeros(len(words), bool)
    for k in range(length):
        covered[starts[of_template] + k] = True
    starts, hashes = starts[~of_template], hashes[~of_template]
    order = np.argsort(hashes, kind="stable")
    hashes, starts = hashes[order], starts[order]
    bits = max(10, int(len(hashes) * 16).bit_length())  # one of 16 to 32 is taken
    maybe = np.zeros(1 << bits, bool)
    maybe[hashes >> np.uint64(64 - bits)] = True
    return _Table(length, hashes, starts, maybe), covered


def _whole(words: np.ndarray, length: int) -> np.ndarray:
    """Return where n-grams begin that have no -1 in them."""
    if len(words) < length:
        return np.zeros(0, np.int64)
    missing = np.concatenate([[0], np.cumsum(words < 0)])
    return np.flatnonzero(missing[length:] == missing[:-length])


def _hash(words: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    hashes = np.zeros(len(starts), np.uint64)
    for k in range(length):
        hashes = (hashes ^ (words[starts + k].astype(np.uint64) + np.uint64(1))) * _FACTOR
        hashes ^= hashes >> np.uint64(29)
    return hashes


def search(index: Index, records: Sequence[Fields]) -> list[list[Match]]:
    """Return the evaluation texts that are in each record, in their order.

    Every n-gram whose hash is found is compared word by word, so there are no false matches, and none is missed.
    """
    lookup = index.vocabulary.get
    ids: list[int] = []
    owners, lengths = [], []
    for number, fields in enumerate(records):
        for _, text in texts_of(fields):
            if len(text) < COVERING:  # fewer words than characters
                continue
            before = len(ids)
            ids.extend(map(lookup, characters(text), itertools.repeat(-1)))
            ids.append(-1)
            owners.append(number)
            lengths.append(len(ids) - before)
    words = np.array(ids, np.int32)
    record_of = np.repeat(np.array(owners, np.int64), np.array(lengths, np.int64))
    shared: dict[tuple[int, int], str] = {}
    at, place = _find(index, index.tables[0], words)
    for start, where in zip(at.tolist(), place.tolist(), strict=True):
        key = int(record_of[start]), int(index.text_of[where])
        if key not in shared:
            shared[key] = _text(index, where, ANY)
    covered: dict[tuple[int, int], np.ndarray] = {}
    at, place = _find(index, index.tables[1], words)
    if len(at):
        pairs = record_of[at] * len(index.texts) + index.text_of[place]
        order = np.argsort(pairs, kind="stable")
        pairs, place = pairs[order], place[order]
        bounds = [0, *(np.flatnonzero(np.diff(pairs)) + 1).tolist(), len(pairs)]
        for start, stop in itertools.pairwise(bounds):
            covered[divmod(int(pairs[start]), len(index.texts))] = place[start:stop]
    found: list[list[Match]] = [[] for _ in records]
    for pair in sorted(shared.keys() | covered.keys()):
        record, number = pair
        match = Match(number, shared.get(pair, ""), _share(index, number, covered.get(pair)))
        if match.ngram or match.covered > COVERED:
            found[record].append(match)
    return found


def _find(index: Index, table: _Table, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where n-grams of the table begin in `words`, and where the same begin in the index's."""
    starts = _whole(words, table.length)
    hashes = _hash(words, starts, table.length)
    bits = len(table.maybe).bit_length() - 1
    likely = table.maybe[hashes >> np.uint64(64 - bits)]
    starts, hashes = starts[likely], hashes[likely]
    first, last = (np.searchsorted(table.hashes, hashes, side) for side in ("left", "right"))
    number = last - first
    at = np.repeat(starts, number)
    # 0, 1, … within each run of equal hashes, from its first.
    place = table.starts[np.repeat(first - np.cumsum(number) + number, number) + np.arange(number.sum())]
    same = np.ones(len(at), bool)
    for k in range(table.length):
        same &= words[at + k] == index.words[place + k]
    return at[same], place[same]


def _text(index: Index, start: int, length: int) -> str:
    """Return some of the index's words as text."""
    text = index.texts[int(index.text_of[start])].text
    first = start - int(np.searchsorted(index.text_of, index.text_of[start]))
    return " ".join(characters(text)[first : first + length])


def _share(index: Index, text: int, starts: np.ndarray | None) -> float:
    """Return the share of a text's words that n-grams of COVERING words cover, its template's left out."""
    if starts is None:
        return 0.0
    places = np.unique(starts[:, None] + np.arange(COVERING))
    return float(np.count_nonzero(index.counts[places]) / max(1, index.own_words[text]))


def report(index: Index, matches: Iterable[tuple[str, Sequence[Match]]]) -> dict[str, Any]:
    """Return what was found, for a JSON file; `matches` are those of each record with the record's file and line.

    For each evaluation set: how many items it has, how many are hit, how many have no text long enough to be found; and
    each item that is hit, with the records that hold it (the first ten).
    """
    hits: dict[int, list[tuple[str, Match]]] = {}
    for where, found in matches:
        for match in found:
            hits.setdefault(match.text, []).append((where, match))
    sets: dict[str, Any] = {}
    items: dict[tuple[str, str], list[int]] = {}
    for number, text in enumerate(index.texts):
        items.setdefault((text.set, text.where), []).append(number)
    for (name, where), numbers in items.items():
        entry = sets.setdefault(name, {"items": 0, "hit": 0, "too_short": 0, "hits": []})
        entry["items"] += 1
        entry["too_short"] += all(number in index.short for number in numbers)
        found_texts = [number for number in numbers if number in hits]
        entry["hit"] += bool(found_texts)
        for number in found_texts:
            entry["hits"].append(
                {
                    "item": where,
                    "field": index.texts[number].field,
                    "text": index.texts[number].text,
                    "records": len(hits[number]),
                    "found_in": [
                        {"record": record, "ngram": match.ngram, "covered": round(match.covered, 4)}
                        for record, match in hits[number][:10]
                    ],
                }
            )
    return sets
