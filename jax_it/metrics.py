"""Scores of generated texts against references: ROUGE, BLEU, chrF, exact match and token F1, from 0 to 100.

ROUGE is `rouge-score`'s, BLEU and chrF are `sacrebleu`'s, on the text as it is. Every example has one
or more references; how each metric treats several is said at its function.
"""

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from statistics import fmean

import sacrebleu

from jax_it.errors import UserError

Scores = dict[str, float]
Predictions = Sequence[str]
References = Sequence[Sequence[str]]  # of each prediction, one or more

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def score(names: Sequence[str], predictions: Predictions, references: References) -> Scores:
    """The metrics called `names`, in that order, over all examples.

    Raises `UserError` for an unknown metric, and `ValueError` where there is no example, or where one has no reference.
    """
    check(names)
    _check_examples(predictions, references)
    types = [name for name in names if name in ROUGE]
    scores = rouge(types, predictions, references) if types else {}
    for name in names:
        if name not in scores:
            scores[name] = METRICS[name](predictions, references)
    return {name: scores[name] for name in names}


def check(names: Sequence[str]) -> None:
    """Refuses an unknown metric: cheap enough to be called before a run, so that it does not fail at its end."""
    lower = {name.lower(): name for name in METRICS}
    for name in names:
        if name not in METRICS:
            close = difflib.get_close_matches(name.lower(), lower, n=1)
            hint = f"did you mean {lower[close[0]]!r}? " if close else ""
            raise UserError(f"metric {name!r} is not known; {hint}there are: {', '.join(METRICS)}")


def rouge(types: Sequence[str], predictions: Predictions, references: References) -> Scores:
    """ROUGE F-measures (Lin 2004) of several types, each text tokenised once for all: the mean over the examples.

    Of several references the best counts, for each type on its own. Words are stemmed (Porter), as in
    Tk-Instruct and in Transformers' examples; T5's own evaluation does not stem, and takes the median of
    bootstrap samples for the mean. rougeLsum takes lines for sentences. Only a-z and 0-9 make words: a
    text in another script scores 0, as does an empty one, even against an empty reference.
    """
    # It imports nltk and with it scipy.stats: a second, which no command should wait for that scores nothing.
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(types), use_stemmer=True)
    best = [scorer.score_multi(texts, prediction) for prediction, texts in zip(predictions, references, strict=True)]
    return {name: 100 * fmean(example[name].fmeasure for example in best) for name in types}


def _rouge_of(name: str, predictions: Predictions, references: References) -> float:
    return rouge([name], predictions, references)[name]


def bleu(predictions: Predictions, references: References) -> float:
    """BLEU of the corpus (Papineni et al. 2002) with sacrebleu's defaults: case kept, tokenizer 13a, exp smoothing.

    N-grams are matched against all references of an example; the one closest in length counts for brevity.
    """
    return float(sacrebleu.corpus_bleu(predictions, _streams(references)).score)


def chrf(predictions: Predictions, references: References) -> float:
    """chrF2 of the corpus (Popović 2015) with sacrebleu's defaults; of several references the best counts."""
    return float(sacrebleu.corpus_chrf(predictions, _streams(references)).score)


def _streams(references: References) -> list[tuple[str, ...]]:
    """The first reference of each example, then the second of each, …; sacrebleu leaves out a None."""
    return list(zip_longest(*references))


def exact_match(predictions: Predictions, references: References) -> float:
    """The share of predictions that equal a reference, white space at both ends aside. Case and punctuation count."""
    return _mean_of_best(lambda prediction, text: float(prediction.strip() == text.strip()), predictions, references)


def token_f1(predictions: Predictions, references: References) -> float:
    """F1 over the words that a prediction shares with a reference (Rajpurkar et al. 2016, SQuAD's evaluation).

    Words are compared as multisets, in lower case and without ASCII punctuation and English articles; of
    several references the best counts. Where no word is left of both texts the F1 is 1, of one of them 0.
    """
    return _mean_of_best(_token_f1, predictions, references)


def _token_f1(prediction: str, reference: str) -> float:
    predicted, expected = _words(prediction), _words(reference)
    if not predicted or not expected:
        return float(predicted == expected)
    return 2 * (predicted & expected).total() / (predicted.total() + expected.total())


def _words(text: str) -> Counter[str]:
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return Counter(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _mean_of_best(metric: Callable[[str, str], float], predictions: Predictions, references: References) -> float:
    examples = zip(predictions, references, strict=True)
    return 100 * fmean(max(metric(prediction, text) for text in texts) for prediction, texts in examples)


METRICS: dict[str, Callable[[Predictions, References], float]] = {
    "rouge1": partial(_rouge_of, "rouge1"),
    "rouge2": partial(_rouge_of, "rouge2"),
    "rougeL": partial(_rouge_of, "rougeL"),
    "rougeLsum": partial(_rouge_of, "rougeLsum"),
    "bleu": bleu,
    "chrf": chrf,
    "exact_match": exact_match,
    "token_f1": token_f1,
}


def _check_examples(predictions: Predictions, references: References) -> None:
    if not predictions:
        raise ValueError("there are no predictions to score")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions and {len(references)} lists of references: one each")
    for i, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"references of example {i}: expected a list of one or more texts, got {texts!r}")
