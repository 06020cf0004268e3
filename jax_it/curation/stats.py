"""`jax-it data stats`: what data sets consist of, as a table, as JSON, and as one HTML page.

Lengths, tasks, turns and first words are of all records. Languages are those of a sample: the LANGUAGE_SAMPLE records
whose numbers have the smallest hashes, however many there are. Duplicates are records of equal text.
"""

import heapq
import html
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import xxhash

from jax_it.curation import texts
from jax_it.curation.input import Chunk, Input
from jax_it.curation.settings import Stats
from jax_it.curation.stage import require
from jax_it.data import templates
from jax_it.data.records import InvalidRecord

LANGUAGE_SAMPLE = 1000  # records
LANGUAGE_CHARACTERS = 400  # of each that are read
MOST = 20  # entries of a list that are shown
LENGTHS = ("prompt characters", "prompt words", "completion characters", "completion words")
QUANTILES = {"min": 0.0, "median": 0.5, "mean": -1.0, "90%": 0.9, "99%": 0.99, "max": 1.0}
_HASH = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: multiples of it are spread evenly

# What instructions ask for. Only a word that an instruction begins with counts, after a "please" or "can you".
_LEADS = frozenset("please kindly now then first can could would will you your i want to need help me using".split())
VERBS = frozenset(
    """
    add analyze analyse answer apply arrange ask assess assign brainstorm build calculate categorize change check
    choose cite classify combine come compare complete compose compute conclude consider construct continue convert
    convince correct count create critique debug decide deduce define delete demonstrate derive describe design
    detect determine develop devise differentiate discuss distinguish divide draft draw edit elaborate eliminate
    estimate evaluate examine expand explain explore express extract fill find fix form format formulate generate
    get give group guess highlight identify imagine implement improve include indicate infer insert integrate
    interpret invent judge justify label learn list locate make map mark match measure mention merge modify multiply
    name narrate order organize outline output paraphrase perform pick plan point predict prepare present produce
    pronounce proofread propose prove provide rank rate read rearrange reason recall recite recommend reconstruct
    reduce rephrase remove reorder repeat replace reply report represent reply research respond restate retrieve
    return reverse review revise rewrite round say score search select separate sequence show simplify solve sort
    speak specify spell split state structure subtract suggest sum summarise summarize support take talk teach tell
    test think trace transcribe transform translate turn unscramble update use validate verify visualize weigh write
    """.split()
)


@dataclass
class _Counts:
    """What is counted of some records; those of two chunks can be added."""

    records: int = 0
    invalid: int = 0
    characters: int = 0
    supervised: int = 0  # characters of the assistant's turns
    lengths: dict[str, Counter[int]] = field(default_factory=lambda: {name: Counter() for name in LENGTHS})
    tasks: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    with_system: int = 0
    first_words: Counter[str] = field(default_factory=Counter)
    verbs: Counter[str] = field(default_factory=Counter)

    def add(self, other: "_Counts") -> None:
        for name, mine in vars(self).items():
            theirs = getattr(other, name)
            if isinstance(mine, int):
                setattr(self, name, mine + theirs)
            elif name == "lengths":
                for key, lengths in theirs.items():
                    mine[key].update(lengths)
            else:
                mine.update(theirs)


class _Chunk(NamedTuple):
    counts: _Counts
    hashes: np.ndarray  # of the texts, uint64
    sample: list[tuple[int, str]]  # the hash of a record's number and its text


def figures(settings: Stats, input: Input) -> dict[str, Any]:
    """Return all figures, as JSON can hold them. Raises UserError for data that cannot be read."""
    classify = require("py3langid", "telling languages").classify
    counts = _Counts()
    sample: list[tuple[int, str]] = []  # a heap with the largest hash, negated, at its top
    largest = 1 << 64

    def threshold(chunk: Chunk) -> int:
        return largest

    hashes_file = input.folder / "hashes"
    with hashes_file.open("wb") as stream:
        for chunk in input.map(partial(_count, settings), threshold):
            counts.add(chunk.counts)
            stream.write(chunk.hashes.data)
            for number, content in chunk.sample:
                if len(sample) < LANGUAGE_SAMPLE:
                    heapq.heappush(sample, (-number, content))
                elif number < -sample[0][0]:
                    heapq.heapreplace(sample, (-number, content))
            if len(sample) == LANGUAGE_SAMPLE:
                largest = -sample[0][0]
    hashes = np.fromfile(hashes_file, np.uint64)
    languages = Counter(classify(content)[0] for _, content in sample)
    return {
        "inputs": [source.path for source in input.sources],
        "records": counts.records,
        "invalid": counts.invalid,
        "duplicates": len(hashes) - len(np.unique(hashes)),
        "supervised_share": counts.supervised / max(counts.characters, 1),
        "lengths": {name: _quantiles(lengths) for name, lengths in counts.lengths.items()},
        "histograms": {name: _histogram(lengths) for name, lengths in counts.lengths.items()},
        "tasks": _ranked(counts.tasks),
        "shapes": _ranked(counts.shapes),
        "turns": {str(number): counts.turns[number] for number in sorted(counts.turns)},
        "with_system": counts.with_system,
        "first_words": _ranked(counts.first_words, MOST),
        "verbs": _ranked(counts.verbs, MOST),
        "languages": _ranked(languages),
        "languages_of": len(sample),
    }


def _count(settings: Stats, chunk: Chunk) -> _Chunk:
    counts = _Counts(records=chunk.size)
    hashes, sample = [], []
    lengths: tuple[list[int], ...] = ([], [], [], [])
    tasks, shapes, turns, openings = [], [], [], []
    for number, record in enumerate(chunk.records(), chunk.start + 1):
        try:
            example = templates.render(record, chunk.template)
        except InvalidRecord:
            counts.invalid += 1
            continue
        prompt, completion = example.prompt, example.completion
        sizes = len(prompt), len(prompt.split()), len(completion), len(completion.split())
        for some, size in zip(lengths, sizes, strict=True):
            some.append(_rounded(size))
        spoken = example.turns[1:] if example.turns[0].role == "system" else example.turns
        counts.with_system += spoken is not example.turns
        for turn in example.turns:
            counts.characters += len(turn.text)
            if turn.role == "assistant":
                counts.supervised += len(turn.text)
        turns.append(len(spoken))
        tasks.append(str(record.fields.get(settings.task, "")))
        shapes.append(templates.shapes(record.fields)[0] if chunk.template == "auto" else chunk.template)
        openings.append(_opening(spoken[0].text))
        hashes.append(xxhash.xxh3_64_intdigest(f"{prompt}\0{completion}".encode()))
        if (hashed := number * _HASH % (1 << 64)) < chunk.note:
            sample.append((hashed, f"{prompt}\n{completion}"[:LANGUAGE_CHARACTERS]))
    counts.tasks.update(tasks)
    counts.shapes.update(shapes)
    counts.turns.update(turns)
    counts.first_words.update(first for first, _ in openings)
    counts.verbs.update(verb for _, verb in openings)
    for name, some in zip(LENGTHS, lengths, strict=True):
        counts.lengths[name].update(some)
    return _Chunk(counts, np.array(hashes, np.uint64), sample)


def _rounded(length: int) -> int:
    """Return a length to three digits, so that few are counted apart."""
    if length < 1000:
        return length
    step: int = 10 ** (len(str(length)) - 3)
    return (length + step // 2) // step * step


def _opening(asked: str) -> tuple[str, str]:
    """Return the first word of an instruction and the verb it begins with, "" where it does not.

    In Chinese, which has no spaces, two characters are taken for a word, as most verbs have.
    """
    first = verb = ""
    for word in asked[:120].split(None, 8)[:8]:
        word = word.strip(".,:;!?\"'()[]").lower()[:30]
        if not word.isascii() and texts.UNSPACED.match(word):
            word = word[:2]
        first = first or word
        if word not in _LEADS:
            verb = word if word in VERBS else ""
            break
    return first, verb


def _quantiles(lengths: Counter[int]) -> dict[str, float]:
    if not lengths:
        return {}
    values, numbers = np.array(sorted(lengths.items())).T
    ends = np.cumsum(numbers)
    found = {}
    for name, share in QUANTILES.items():
        if share < 0:
            found[name] = round(float((values * numbers).sum() / ends[-1]), 1)
        else:
            found[name] = int(values[np.searchsorted(ends, max(share * ends[-1], 1))])
    return found


def _histogram(lengths: Counter[int]) -> dict[str, int]:
    """Return how many lengths are below each power of two, and not below the one before; 0 alone."""
    bins: Counter[int] = Counter()
    for length, number in lengths.items():
        bins[length.bit_length()] += number
    return {str((1 << bits) - 1): bins[bits] for bits in range(max(bins, default=-1) + 1)}


def _ranked(counted: Counter[str], most: int | None = None) -> dict[str, int]:
    found = sorted(((key, number) for key, number in counted.items() if key), key=lambda item: (-item[1], item[0]))
    return dict(found[:most])


def text(found: Mapping[str, Any]) -> str:
    """Return the figures as a table."""
    records = found["records"]
    lines = [
        f"{records} records, {found['invalid']} invalid, {found['duplicates']} duplicates of equal text",
        f"completions are {found['supervised_share']:.1%} of the characters",
        "",
        f"{'':22}" + "".join(f"{name:>10}" for name in QUANTILES),
    ]
    for name in LENGTHS:
        lines.append(f"{name:22}" + "".join(f"{found['lengths'][name].get(key, 0):>10}" for key in QUANTILES))
    for title, counted, total in _lists(found):
        shown = list(counted.items())[:MOST]
        more = f" (and {len(counted) - MOST} more)" if len(counted) > MOST else ""
        lines += ["", f"{title}{more}"]
        lines += [f"  {number:>9} {number / total:>6.1%}  {name}" for name, number in shown] or ["  none"]
    return "\n".join(lines)


def _lists(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, int], int]]:
    valid = max(found["records"] - found["invalid"], 1)
    return [
        ("Shapes or templates", found["shapes"], valid),
        ("Tasks", found["tasks"], valid),
        (f"Languages, of a sample of {found['languages_of']}", found["languages"], max(found["languages_of"], 1)),
        ("Turns", found["turns"], valid),
        ("First words of instructions", found["first_words"], valid),
        ("Verbs that instructions begin with", found["verbs"], valid),
    ]


def page(found: Mapping[str, Any]) -> str:
    """Return the figures as one HTML page that needs no other file."""
    rows = ""
    for name in LENGTHS:
        cells = "".join(f"<td>{found['lengths'][name].get(key, 0)}</td>" for key in QUANTILES)
        rows += f"<tr><th>{name}</th>{cells}</tr>"
    plots = "".join(
        _plot(f"{name}: records by length, up to", list(found["histograms"][name].items()), found["records"])
        for name in LENGTHS
    )
    plots += "".join(_plot(title, list(counted.items())[:MOST], total) for title, counted, total in _lists(found))
    names = html.escape(", ".join(found["inputs"]))
    return f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Statistics of {names}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse }} th, td {{ padding: .2rem .8rem; text-align: right }}
th:first-child {{ text-align: left }} svg {{ max-width: 100%; font: 12px system-ui, sans-serif }}
</style>
<h1>{names}</h1>
<p>{found["records"]} records, {found["invalid"]} invalid, {found["duplicates"]} duplicates of equal text;
completions are {found["supervised_share"]:.1%} of the characters.</p>
<table><tr><th></th>{"".join(f"<th>{name}</th>" for name in QUANTILES)}</tr>{rows}</table>
{plots}
</html>
"""


def _plot(title: str, bars: Sequence[tuple[str, int]], total: int) -> str:
    """Return a bar chart as SVG, with its heading."""
    longest = max((number for _, number in bars), default=1) or 1
    parts = []
    for i, (name, number) in enumerate(bars):
        y, width = 20 * i, 400 * number / longest
        label = html.escape(name if len(name) <= 40 else f"{name[:39]}…")
        parts.append(
            f'<text x="270" y="{y + 14}" text-anchor="end">{label}</text>'
            f'<rect x="280" y="{y + 3}" width="{width:.1f}" height="14" fill="#4878a8"/>'
            f'<text x="{286 + width:.1f}" y="{y + 14}">{number} ({number / max(total, 1):.1%})</text>'
        )
    size = 20 * len(bars)
    return (
        f'<h2>{html.escape(title)}</h2><svg viewBox="0 0 800 {size}" width="800" height="{size}">{"".join(parts)}</svg>'
    )
