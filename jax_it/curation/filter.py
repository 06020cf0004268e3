"""Rules that keep or drop a record by its texts: length, language, patterns, personal data, unsafe words."""

import math
import re
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from importlib.resources import files as package_files
from typing import Any

import numpy as np
import regex

from jax_it.config import Data
from jax_it.curation import personal_data
from jax_it.curation.fields import map_texts, texts_of
from jax_it.curation.input import Input
from jax_it.curation.planned import Decisions, PerDecision
from jax_it.curation.settings import Filter
from jax_it.curation.stage import Dropped, Kept, Outcome, PerRecord, Plan, invalid, require
from jax_it.curation.texts import part_of
from jax_it.data import sources, templates
from jax_it.data import tokenizer_files as tokenizers
from jax_it.data.records import Fields, InvalidRecord, Record
from jax_it.data.templates import Example
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError, shown
from jax_it.metrics import characters
from jax_it.metrics.languages import spaced

SECONDS = 1.0  # of a pattern on one text


def plan(settings: Filter, input: Input) -> Plan:
    _check(settings)
    if not settings.model:
        return Plan(PerRecord(partial(_by_texts, settings)))
    return _by_scores(settings, input)


def _check(settings: Filter) -> None:
    """Raise UserError for settings that nothing would read, and for patterns, words and models that are not there."""
    bounds = [
        (f"{end}_{what}", getattr(settings, f"{end}_{what}"))
        for what in ("characters", "words", "tokens", "loss", "ifd")
        for end in ("min", "max")
    ]
    named = {name for name, value in bounds if value}
    of_tokens, of_model = named & {"min_tokens", "max_tokens"}, named & {"min_loss", "max_loss", "min_ifd", "max_ifd"}
    texts = (settings.languages, settings.match, settings.exclude, settings.personal_data, settings.unsafe)
    if not named and not any(texts) and not settings.keep_scores:
        raise UserError("filter: no rule is given; see jax-it data filter --help")
    for name, value in bounds:
        if value < 0 or not math.isfinite(value):
            raise UserError(f"--{name.replace('_', '-')}: {value} is not a number from 0; leave it out for no limit")
    for what in ("characters", "words", "tokens", "loss", "ifd"):
        least, most = (getattr(settings, f"{end}_{what}") for end in ("min", "max"))
        if most and least > most:
            raise UserError(f"--min-{what} {least} is more than --max-{what} {most}; exchange them")
    if bool(of_tokens) != bool(settings.tokenizer):
        raise UserError("--min-tokens and --max-tokens need --tokenizer, and it needs one of them; add what is missing")
    if bool(of_model or settings.keep_scores) != bool(settings.model):
        raise UserError("scores need --model, and it needs --max-loss, --max-ifd or the like; add what is missing")
    if settings.redact and not (settings.personal_data or settings.unsafe):
        raise UserError("--redact replaces what --personal-data or --unsafe find; add one of them")
    if settings.unsafe_words and not settings.unsafe:
        raise UserError("--unsafe-words is the list of --unsafe; add that")
    kinds = set(settings.personal_data) - {"all", *personal_data.KINDS}
    if kinds:
        raise UserError(f"--personal-data: {', '.join(sorted(kinds))}: choose all, or {', '.join(personal_data.KINDS)}")
    if settings.personal_data:
        require("stdnum", "--personal-data")
        phones = require("phonenumbers", "--personal-data")
        if settings.phone_region and settings.phone_region not in phones.SUPPORTED_REGIONS:
            raise UserError(f"--phone-region: {settings.phone_region} is not a country's code, such as US or DE")
    if settings.languages:
        require("py3langid", "--languages")
        known = set(_identifier().labels)
        if unknown := set(settings.languages) - known:
            raise UserError(f"--languages: {', '.join(sorted(unknown))}: not among {', '.join(sorted(known))}")
    for option, pattern in (("--match", settings.match), ("--exclude", settings.exclude)):
        compile_pattern(pattern, option)
    if settings.unsafe:
        unsafe_words(settings.unsafe_words)
    if settings.tokenizer:
        _tokenizer(settings.tokenizer)


def _by_texts(settings: Filter, record: Record, template: str) -> Outcome:
    """Apply every rule that needs no model to a record."""
    outcome = _of_text(settings, record, template)
    if outcome is not None:
        return outcome
    kinds, words = _kinds(settings), unsafe_words(settings.unsafe_words) if settings.unsafe else None
    if settings.redact:
        return Kept(*redact(record.fields, kinds, settings.phone_region, words))
    seen: dict[str, None] = {}
    for _, text in texts_of(record.fields):
        seen.update(dict.fromkeys(one.kind for one in personal_data.find(text, kinds, settings.phone_region)))
        if words is not None and (found := words.search(text)):
            return Dropped("unsafe words", {"words": found[0]})
    return Dropped("personal data", {"kinds": sorted(seen)}) if seen else Kept(record.fields)


def _of_text(settings: Filter, record: Record, template: str) -> Dropped | None:
    """Return why a record is dropped by its rendered text, None if it is not."""
    bounds = [
        (what, count, getattr(settings, f"min_{what}"), getattr(settings, f"max_{what}"))
        for what, count in _LENGTHS.items()
    ]
    bounds = [bound for bound in bounds if bound[2] or bound[3]]
    if not (bounds or settings.languages or settings.match or settings.exclude):
        return None
    text = part_of(templates.render(record, template), settings.on)
    for what, count, least, most in bounds:
        number = count(text, settings)
        if number < least:
            return Dropped(f"fewer than {least} {what}", {what: number})
        if most and number > most:
            return Dropped(f"more than {most} {what}", {what: number})
    if settings.languages and (code := language(text)[0]) not in settings.languages:
        return Dropped("another language", {"language": code})
    if settings.match and not matches(compile_pattern(settings.match, "--match"), text, record.where):
        return Dropped("the pattern of --match is not in it")
    if settings.exclude and matches(compile_pattern(settings.exclude, "--exclude"), text, record.where):
        return Dropped("the pattern of --exclude is in it")
    return None


@lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer:
    return tokenizers.load(path)


_LENGTHS: dict[str, Callable[[str, Filter], int]] = {
    "characters": lambda text, settings: len(text),
    "words": lambda text, settings: len(characters(text)),
    "tokens": lambda text, settings: len(_tokenizer(settings.tokenizer).encode([text])[0]),
}


def _kinds(settings: Filter) -> tuple[str, ...]:
    chosen = personal_data.KINDS if "all" in settings.personal_data else settings.personal_data
    return tuple(chosen)


def _by_scores(settings: Filter, input: Input) -> Plan:
    """Plan with a model: the records that the other rules keep are scored here, in this process."""
    from jax_it.curation.answer_loss import AnswerLosses
    from jax_it.run import load_run

    run, params = load_run(settings.model)
    losses = AnswerLosses(run, params, settings.batch_size)
    size = settings.max_seq_length
    data = Data(max_seq_length=size, max_source_length=size, max_target_length=size, train_on="last")
    with_ifd = bool(settings.min_ifd or settings.max_ifd or settings.keep_scores)
    store = Decisions(input)
    scored = []
    for chunk in input.chunks():
        decisions: list[Any] = []
        waiting: list[tuple[int, Record, Example]] = []
        for number, record in enumerate(chunk.records()):
            try:
                outcome = invalid(record.error) if record.error else _by_texts(settings, record, chunk.template)
                if isinstance(outcome, Kept):
                    waiting.append((number, record, templates.render(record, chunk.template)))
            except InvalidRecord as error:
                outcome = invalid(error)
            decisions.append(outcome)
        examples, places = [item[2] for item in waiting], [item[1].where for item in waiting]
        for (number, _, _), found in zip(waiting, losses(examples, places, data, alone=with_ifd), strict=True):
            decisions[number] = decisions[number], found.loss, found.ifd
            scored.append((found.loss, found.ifd))
        store.put(chunk.start, decisions)
    return Plan(PerDecision(partial(_scored, settings)), store, {"scores": _quantiles(scored)})


def _quantiles(scored: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Return how the scores are spread, to choose limits by."""
    found = {}
    for name, column in zip(("loss", "ifd"), np.array(scored, float).reshape(-1, 2).T, strict=True):
        known = column[np.isfinite(column)]
        points = (5, 25, 50, 75, 95)
        if len(known):
            found[name] = dict(
                zip(map("{}%".format, points), np.percentile(known, points).round(4).tolist(), strict=True)
            )
    return found


def _scored(settings: Filter, record: Record, template: str, decision: Any) -> Outcome:
    if isinstance(decision, Dropped | Kept):
        return decision
    kept, loss, ifd = decision
    for name, value in (("loss", loss), ("ifd", ifd)):
        least, most = getattr(settings, f"min_{name}"), getattr(settings, f"max_{name}")
        if not (least or most):
            continue
        if not math.isfinite(value):
            return Dropped("no answer to score")
        if value < least:
            return Dropped(f"{name} below {least}", {name: round(value, 6)})
        if most and value > most:
            return Dropped(f"{name} above {most}", {name: round(value, 6)})
    if not settings.keep_scores:
        return kept
    return Kept({**kept.fields, "scores": {"loss": round(loss, 6), "ifd": round(ifd, 6)}}, kept.changes)


@lru_cache(maxsize=8)
def compile_pattern(pattern: str, option: str) -> Any:
    """Return a compiled regular expression. Raises UserError that names the option."""
    try:
        return regex.compile(pattern)
    except (regex.error, re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{option}: {shown(pattern)} is not a regular expression: {error}") from None


def matches(pattern: Any, text: str, where: str) -> bool:
    """Return whether the pattern is in the text. Raises UserError, with the record's place, if that takes too long."""
    try:
        return pattern.search(text, timeout=SECONDS) is not None
    except TimeoutError:
        raise UserError(
            f"{where}: the pattern {shown(pattern.pattern)} takes more than {SECONDS:g} s on this text; simplify it"
        ) from None


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language(text: str) -> tuple[str, float]:
    """Return the code (ISO 639-1) of the text's likeliest language, and its probability."""
    code, probability = _identifier().classify(text)
    return code, float(probability)


@lru_cache(maxsize=4)
def unsafe_words(file: str = "") -> Any:
    """Return the pattern of a word list, one word or phrase a line; without a file, of the list that comes with jax_it.

    Raises UserError for a file that cannot be read, and for one without words.
    """
    if file:
        text = sources.read_text(file, "--unsafe-words")
    else:
        text = (package_files("jax_it.curation") / "unsafe_words.txt").read_text(encoding="utf-8")
    words = [" ".join(line.split()) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not words:
        raise UserError(f"--unsafe-words: {file} has no words; write one on each line")
    # Between words of a script without spaces there is no boundary.
    unspaced = [regex.escape(word) for word in words if spaced(word) != word]
    patterns = [r"\b\L<words>\b", *dict.fromkeys(unspaced)]
    return regex.compile("|".join(patterns), regex.IGNORECASE, words=words)


def redact(fields: Fields, kinds: Sequence[str], region: str, words: Any | None) -> tuple[Fields, tuple[str, ...]]:
    """Return a record with personal data and unsafe words replaced, and the kinds of what was replaced.

    `words` is the pattern of `unsafe_words`; None leaves them.
    """
    seen: dict[str, None] = {}

    def change(text: str) -> str:
        found = personal_data.find(text, tuple(kinds), region)
        seen.update(dict.fromkeys(one.kind for one in found))
        text = personal_data.redact(text, found)
        if words is not None:
            text, number = words.subn("[UNSAFE]", text)
            seen.update({"unsafe": None} if number else {})
        return text

    return map_texts(fields, change), tuple(seen)
