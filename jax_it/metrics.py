"""Scores of generated texts against references: ROUGE, BLEU, chrF, exact matches and token F1, from 0 to 100.

ROUGE is `rouge-score`'s, BLEU and chrF are `sacrebleu`'s, on the text as it is. Every example has one
or more references; how each metric treats several is said at its function. A name's ending says how a
text is cut into tokens where it is not the metric's own way: `rougeL_chars`, `bleu_zh`.
"""

import difflib
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial
from itertools import zip_longest
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import sacrebleu

from jax_it.errors import UserError

Scores = dict[str, float]
Predictions = Sequence[str]
References = Sequence[Sequence[str]]  # of each prediction, one or more

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
ROUGE_CHARS = ("rouge1_chars", "rouge2_chars", "rougeL_chars")

# Letters of the scripts that do not part words by spaces, and of Korean, whose endings are written onto the word.
_UNSPACED = re.compile(
    "[\u3005-\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "\u3041-\u30ff\u31f0-\u31ff\u3105-\u312f\u31a0-\u31bf"  # kana and bopomofo
    "\u1100-\u11ff\ua960-\ua97f\uac00-\ud7ff"  # Hangul
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]"  # Thai, Lao, Burmese, Khmer
)
# A minus counts where it joins no two things (not in 3-5), and a comma where it groups thousands (or lakhs).
_NUMBER = re.compile(
    r"(?:(?<![\dA-Za-z)\]])([-−]))?(?:\$([-−])?)?"
    r"(\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<![\dA-Za-z.])\.\d+)"
)


def score(names: Sequence[str], predictions: Predictions, references: References) -> Scores:
    """The metrics called `names`, in that order, over all examples.

    Raises `UserError` for an unknown metric, and `ValueError` where there is no example, or where one has no reference.
    """
    check(names)
    _check_examples(predictions, references)
    scores: Scores = {}
    for family, score_family in ((ROUGE, rouge), (ROUGE_CHARS, rouge_chars)):
        if wanted := [name for name in names if name in family]:
            scores |= score_family(wanted, predictions, references)
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
    return dict(zip(types, _rouge(types, None, predictions, references), strict=True))


def rouge_chars(names: Sequence[str], predictions: Predictions, references: References) -> Scores:
    """`rouge` for text in any script, under names that end in `_chars`, over the tokens of `characters`.

    Nothing is stemmed.
    """
    types = [name.removesuffix("_chars") for name in names]
    return dict(zip(names, _rouge(types, characters, predictions, references), strict=True))


def characters(text: str) -> list[str]:
    """Each character of Chinese, Japanese, Korean, Thai, Lao, Burmese and Khmer, and whole words of the rest.

    Words are runs of letters and digits, in lower case; marks stay on their letter, and all else is
    dropped. Unicode's compatibility forms count as what they stand for (NFKC): full width is half width.
    """
    tokens: list[str] = []
    before = ""  # what the last token can take: "" nothing, "M" marks, "LNM" letters, digits and marks
    for character in unicodedata.normalize("NFKC", text).lower():
        kind = unicodedata.category(character)[0]
        alone = kind != "M" and bool(_UNSPACED.match(character))
        if kind in before and not alone:
            tokens[-1] += character
        elif kind in "LN":
            tokens.append(character)
            before = "M" if alone else "LNM"
        else:
            before = ""
    return tokens


def _rouge(
    types: Sequence[str],
    tokenize: Callable[[str], list[str]] | None,
    predictions: Predictions,
    references: References,
) -> list[float]:
    """The mean F-measure of each type; None: English words, stemmed."""
    # It imports nltk and with it scipy.stats: a second, which no command should wait for that scores nothing.
    from rouge_score.rouge_scorer import RougeScorer

    tokenizer: Any = SimpleNamespace(tokenize=tokenize) if tokenize else None
    scorer = RougeScorer(list(types), use_stemmer=tokenize is None, tokenizer=tokenizer)
    best = [scorer.score_multi(texts, prediction) for prediction, texts in zip(predictions, references, strict=True)]
    return [100 * fmean(example[name].fmeasure for example in best) for name in types]


def _one(
    family: Callable[[Sequence[str], Predictions, References], Scores],
    name: str,
    predictions: Predictions,
    references: References,
) -> float:
    return family([name], predictions, references)[name]


def bleu(predictions: Predictions, references: References) -> float:
    """BLEU of the corpus (Papineni et al. 2002) with sacrebleu's defaults: case kept, tokenizer 13a, exp smoothing.

    N-grams are matched against all references of an example; the one closest in length counts for brevity.
    """
    return float(sacrebleu.corpus_bleu(predictions, _streams(references)).score)


def bleu_zh(predictions: Predictions, references: References) -> float:
    """`bleu` for Chinese, with sacrebleu's tokenizer zh: Chinese characters one by one, the rest as in 13a."""
    return float(sacrebleu.corpus_bleu(predictions, _streams(references), tokenize="zh").score)


def chrf(predictions: Predictions, references: References) -> float:
    """chrF2 of the corpus (Popović 2015) with sacrebleu's defaults; of several references the best counts."""
    return float(sacrebleu.corpus_chrf(predictions, _streams(references)).score)


def _streams(references: References) -> list[tuple[str, ...]]:
    """The first reference of each example, then the second of each, …; sacrebleu leaves out a None."""
    return list(zip_longest(*references))


def exact_match(predictions: Predictions, references: References) -> float:
    """The share of predictions that equal a reference, white space at both ends aside. Case and punctuation count."""
    return _mean_of_best(lambda prediction, text: float(prediction.strip() == text.strip()), predictions, references)


def final_number(predictions: Predictions, references: References) -> float:
    """The share of predictions whose final number equals a reference's (GSM8K's exact match, Cobbe et al. 2021).

    The final number is the first one after the last "####", or else the last of the text. Numbers are
    compared as exact decimals: 1,234.50 equals $1234.5, and 20% equals 20. Where either text has none, they differ.
    """

    def equal(prediction: str, reference: str) -> float:
        number = find_final_number(prediction)
        return float(number is not None and number == find_final_number(reference))

    return _mean_of_best(equal, predictions, references)


def find_final_number(text: str) -> Decimal | None:
    """The first number after the last "####", or else the last number of the text; None where there is none."""
    _, mark, end = text.rpartition("####")
    if mark and (numbers := _numbers(end)):
        return numbers[0]
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def _numbers(text: str) -> list[Decimal]:
    return [
        Decimal(("-" if before or after else "") + digits.replace(",", ""))
        for before, after, digits in _NUMBER.findall(text)
    ]


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
    "rouge1": partial(_one, rouge, "rouge1"),
    "rouge2": partial(_one, rouge, "rouge2"),
    "rougeL": partial(_one, rouge, "rougeL"),
    "rougeLsum": partial(_one, rouge, "rougeLsum"),
    "rouge1_chars": partial(_one, rouge_chars, "rouge1_chars"),
    "rouge2_chars": partial(_one, rouge_chars, "rouge2_chars"),
    "rougeL_chars": partial(_one, rouge_chars, "rougeL_chars"),
    "bleu": bleu,
    "bleu_zh": bleu_zh,
    "chrf": chrf,
    "exact_match": exact_match,
    "final_number": final_number,
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
