"""Scores of generated texts against references: ROUGE, BLEU, chrF, TER, exact matches and F1, and a user's own.

`rouge`, `translation` and `answers` say what each counts, and how it treats several references. A name's
ending says how a text is cut into words where it is not the metric's own way: `rougeL_chars`, `bleu_zh`.
"""

import difflib
from collections.abc import Mapping, Sequence

from jax_it.errors import UserError
from jax_it.metrics import answers, bootstrap, custom, rouge, translation
from jax_it.metrics.answers import find_final_number
from jax_it.metrics.custom import is_custom
from jax_it.metrics.languages import advice, characters
from jax_it.metrics.metric import Array, Metric, Predictions, References, Values, mean, value
from jax_it.metrics.result import Result

__all__ = [
    "METRICS", "Predictions", "References", "Result", "advice", "characters", "check", "find_final_number",
    "is_custom", "lower_is_better", "measure", "score",
]  # fmt: skip

METRICS: dict[str, Metric] = {
    "rouge1": rouge.rouge("rouge1"),
    "rouge2": rouge.rouge("rouge2"),
    "rougeL": rouge.rouge("rougeL"),
    "rougeLsum": rouge.rouge("rougeLsum"),
    "rougeLsum_sentences": rouge.rouge("rougeLsum_sentences"),
    "rouge1_chars": rouge.rouge("rouge1_chars"),
    "rouge2_chars": rouge.rouge("rouge2_chars"),
    "rougeL_chars": rouge.rouge("rougeL_chars"),
    "bleu": translation.bleu("bleu"),
    "bleu_zh": translation.bleu("bleu_zh"),
    "bleu_ja": translation.bleu("bleu_ja"),
    "bleu_ko": translation.bleu("bleu_ko"),
    "bleu_char": translation.bleu("bleu_char"),
    "bleu_flores200": translation.bleu("bleu_flores200"),
    "chrf": translation.chrf(),
    "ter": translation.ter(),
    "ter_chars": translation.ter(of_characters=True),
    "exact_match": answers.exact_match(),
    "squad_exact_match": answers.squad_exact_match(),
    "squad_exact_match_chars": answers.squad_exact_match(of_characters=True),
    "squad_f1": answers.squad_f1(),
    "squad_f1_chars": answers.squad_f1(of_characters=True),
    "token_f1": answers.squad_f1(),
    "final_number": answers.final_number(),
}


def score(names: Sequence[str], predictions: Predictions, references: References) -> dict[str, float]:
    """Return the metrics called `names`, in that order, over all examples.

    Raises `UserError` for an unknown metric and for a user's own that fails, and `ValueError` where there is
    no example, or where one has no reference.
    """
    result = measure(names, predictions, references, {"all": range(len(predictions))}, resamples=0)
    for error in result.errors.get("all", {}).values():
        raise UserError(error)
    return result.metrics["all"]


def measure(
    names: Sequence[str],
    predictions: Predictions,
    references: References,
    groups: Mapping[str, Sequence[int]],
    resamples: int = 1000,
    seed: int = 0,
) -> Result:
    """Measure each group of examples, given by their indices, with 95 % bootstrap intervals.

    The result has no predictions; a user's metric that returns a dict is called NAME.KEY there. Each text is looked at
    once, however many groups there are; but a user's metric that returns a number for all examples together is called
    for each group, and gets no interval, nor does a group of one example. Without `resamples` there are no intervals.
    A metric that fails leaves its reason in `errors`, and does not affect the others.

    Raises as `score` does, but not for a metric that fails.
    """
    check(names)
    _check_examples(predictions, references)
    for group, indices in groups.items():
        if not indices:
            raise ValueError(f"group {group!r} holds no example")
    # Of each metric its numbers for each example, from which every group and resample takes its rows.
    # All types of ROUGE are computed together: cutting the texts into words takes most of the time.
    rows: dict[str, Array] = rouge.statistics(names, predictions, references)
    failed: dict[str, str] = {}
    for name in names:
        if name in METRICS and name not in rows:
            try:
                rows[name] = METRICS[name].statistics(predictions, references)
            except UserError as error:  # of references that are not what the metric needs
                failed[name] = str(error)
    own = {name: _Custom(name, predictions, references) for name in names if is_custom(name)}
    values: dict[str, dict[str, float]] = {}
    intervals: dict[str, dict[str, tuple[float, float]]] = {}
    errors: dict[str, dict[str, str]] = {}
    for group, indices in groups.items():
        chosen = list(indices)
        values[group], reasons = {}, dict(failed)
        by_example: dict[str, tuple[Values, Array]] = {}
        for name in names:
            if name in rows:
                by_example[name] = METRICS[name].values, rows[name][chosen]
                values[group][name] = value(*by_example[name])
            elif name in own:
                try:
                    measured = own[name].over(chosen)
                except UserError as error:
                    reasons[name] = str(error)
                    continue
                for key, numbers in measured.items():
                    if isinstance(numbers, float):
                        values[group][key] = numbers
                    else:
                        by_example[key] = mean, numbers
                        values[group][key] = value(*by_example[key])
        if resamples > 0 and len(chosen) > 1 and by_example:
            intervals[group] = bootstrap.intervals(by_example, resamples, seed)
        if reasons:
            errors[group] = reasons
    return Result(values, [], intervals, errors, advice(names, references))


class _Custom:
    """A user's metric: called once on all examples, and on a group only if that result is not by example."""

    def __init__(self, name: str, predictions: Predictions, references: References):
        self._name, self._predictions, self._references = name, predictions, references
        self._over_all: dict[str, float | Array] | UserError
        try:
            self._over_all = custom.call(name, predictions, references)
        except UserError as error:
            self._over_all = error

    def over(self, chosen: list[int]) -> dict[str, float | Array]:
        """Return its values on the chosen examples. Raises UserError where it fails on them."""
        if chosen == list(range(len(self._predictions))):
            if isinstance(self._over_all, UserError):
                raise self._over_all
            return self._over_all
        if not isinstance(self._over_all, UserError):
            arrays = {key: found[chosen] for key, found in self._over_all.items() if not isinstance(found, float)}
            if len(arrays) == len(self._over_all):
                return dict(arrays)
        return custom.call(self._name, [self._predictions[i] for i in chosen], [self._references[i] for i in chosen])


def check(names: Sequence[str], where: str = "config.eval.metrics") -> None:
    """Refuse an unknown metric, or one whose packages, files or function are missing, before a run starts.

    `where` is the setting that names the metrics.
    """
    lower = {name.lower(): name for name in METRICS}
    for name in names:
        if is_custom(name):
            custom.load(name)
        elif name in METRICS:
            METRICS[name].check()
        else:
            close = difflib.get_close_matches(name.lower(), lower, n=1)
            hint = f"did you mean {lower[close[0]]!r}? " if close else ""
            known = f"there are: {', '.join(METRICS)}, and your own as FILE.py:FUNCTION"
            raise UserError(f"{where}: metric {name!r} is not known; {hint}{known}")


def lower_is_better(name: str) -> bool:
    """Return whether less of a metric, or of its mean over groups, is better. Of a user's own metric, more is.

    The metrics of lm_eval have a filter in their names, as "word_perplexity,none".
    """
    name = name.removesuffix("_macro").split(",")[0]
    return name in _LOWER_IS_BETTER or (name in METRICS and METRICS[name].lower_is_better)


_LOWER_IS_BETTER = ("loss", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score")


def _check_examples(predictions: Predictions, references: References) -> None:
    if not predictions:
        raise ValueError("there are no predictions to score")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions and {len(references)} lists of references: one each")
    for i, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"references of example {i}: expected a list of one or more texts, got {texts!r}")
