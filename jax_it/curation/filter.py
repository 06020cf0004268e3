"""Rules that keep or drop a record by its texts: length, language, patterns, personal data, unsafe words."""

import math
import re
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from importlib.resources import files as package_files
from typing import Any

import jinja2
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
from jax_it.data import chat_template, sources, templates
from jax_it.data import tokenizer_files as tokenizers
from jax_it.data.encoded import Encoded
from jax_it.data.records import Fields, InvalidRecord, Record
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError, first_line, shown
from jax_it.metrics import characters
from jax_it.metrics.languages import spaced

SECONDS = 1.0  # of a pattern on one text


def plan(settings: Filter, input: Input) -> Plan:
    _check(settings)
    if not settings.model and not settings.classifier:
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
    if not named and not any(texts) and not settings.classifier and not settings.keep_scores:
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
    if (of_model and not settings.model) or (settings.model and not (of_model or settings.keep_scores)):
        raise UserError("scores need --model, and it needs --max-loss, --max-ifd or the like; add what is missing")
    if settings.keep_scores and not (settings.model or settings.classifier):
        raise UserError("--keep-scores needs --model or --classifier; add one of them")
    _check_classifier(settings)
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


def _check_classifier(settings: Filter) -> None:
    options = ("classifier_prompt", "classifier_labels", "max_unsafe_probability")
    for name in options:
        if not settings.classifier and getattr(settings, name) != getattr(Filter(), name):
            raise UserError(f"--{name.replace('_', '-')} is for --classifier; add that")
    if not 0 < settings.max_unsafe_probability <= 1:
        raise UserError(f"--max-unsafe-probability: {settings.max_unsafe_probability} is not above 0 and at most 1")
    if len(settings.classifier_labels) < 2:
        raise UserError("--classifier-labels: give two or more, first the unsafe one")
    if settings.classifier_prompt:
        _check_prompt(settings.classifier_prompt)


def _check_prompt(file: str) -> None:
    """Refuse a file that is not Jinja text, and text that reads nothing of a record or what there is not."""
    try:
        names = chat_template.variables_of(sources.read_text(file, "--classifier-prompt"))
    except (jinja2.TemplateError, RecursionError) as error:
        raise UserError(f"--classifier-prompt: {file} is not valid Jinja: {first_line(error)}") from None
    known = {"prompt", "completion", "messages", "tools"}
    listed = ", ".join(sorted(known))
    if unknown := sorted(name for name in names - known - {"add_generation_prompt"} if not name.endswith("_token")):
        raise UserError(f"--classifier-prompt: {file} reads {shown(unknown[0], 60)}; the variables are {listed}")
    if not names & known:
        raise UserError(f"--classifier-prompt: {file} reads nothing of a record; the variables are {listed}")


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
    """Plan with models: the records that the other rules keep are scored here, in this process."""
    from jax_it.curation.answer_loss import AnswerLosses
    from jax_it.curation.classifier import Classifier
    from jax_it.run import load_run

    size, rows = settings.max_seq_length, settings.batch_size
    losses = AnswerLosses(*load_run(settings.model), rows) if settings.model else None
    classifier = None
    if settings.classifier:
        file, labels = settings.classifier_prompt, settings.classifier_labels
        template = sources.read_text(file, "--classifier-prompt") if file else ""
        classifier = Classifier(*load_run(settings.classifier), rows, template, labels, size)
    data = Data(max_seq_length=size, max_source_length=size, max_target_length=size, train_on="last")
    with_ifd = bool(settings.min_ifd or settings.max_ifd or settings.keep_scores)
    store = Decisions(input)
    scored: list[dict[str, float]] = []
    for chunk in input.chunks():
        decisions: list[Any] = []
        waiting: list[int] = []
        examples: list[Encoded | None] = []
        prompts: list[str] = []
        for number, record in enumerate(chunk.records()):
            try:
                outcome = invalid(record.error) if record.error else _by_texts(settings, record, chunk.template)
                if isinstance(outcome, Kept):
                    example = templates.render(record, chunk.template)
                    # Either may refuse the record: both are made before a list grows.
                    encoded = losses.encode(example, record.where, data) if losses is not None else None
                    prompt = classifier.prompt(example, record.where) if classifier is not None else ""
                    examples.append(encoded)
                    prompts.append(prompt)
                    waiting.append(number)
            except InvalidRecord as error:
                outcome = invalid(error)
            decisions.append(outcome)
        scores: list[dict[str, float]] = [{} for _ in waiting]
        if losses is not None:
            for item, found in zip(scores, losses(examples, alone=with_ifd), strict=True):
                item.update(loss=found.loss, ifd=found.ifd)
        if classifier is not None:
            for item, probability in zip(scores, classifier(prompts), strict=True):
                item.update(unsafe=probability)
        for number, item in zip(waiting, scores, strict=True):
            decisions[number] = decisions[number], item
        scored += scores
        store.put(chunk.start, decisions)
    return Plan(PerDecision(partial(_scored, settings)), store, {"scores": _quantiles(scored)})


def _quantiles(scored: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return how the scores are spread, to choose limits by."""
    found = {}
    for name in scored[0] if scored else ():
        column = np.array([scores[name] for scores in scored], float)
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
    kept, scores = decision
    for name in ("loss", "ifd"):
        least, most = getattr(settings, f"min_{name}"), getattr(settings, f"max_{name}")
        if not (least or most):
            continue
        value = scores[name]
        if not math.isfinite(value):
            return Dropped("no answer to score")
        if value < least:
            return Dropped(f"{name} below {least}", {name: round(value, 6)})
        if most and value > most:
            return Dropped(f"{name} above {most}", {name: round(value, 6)})
    if settings.classifier:
        if not math.isfinite(scores["unsafe"]):
            return Dropped(f"more than {settings.max_seq_length} tokens for the classifier")
        if scores["unsafe"] > settings.max_unsafe_probability:
            return Dropped(f"unsafe above {settings.max_unsafe_probability}", {"unsafe": round(scores["unsafe"], 6)})
    if not settings.keep_scores:
        return kept
    finite = {name: round(value, 6) if math.isfinite(value) else None for name, value in scores.items()}
    return Kept({**kept.fields, "scores": finite}, kept.changes)


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
