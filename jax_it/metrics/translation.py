"""BLEU, chrF and TER of a corpus, by sacrebleu with its defaults, on the text as it is."""

from collections.abc import Callable
from dataclasses import replace
from itertools import zip_longest

import numpy as np
import sacrebleu
from sacrebleu.metrics.base import Metric as SacreBLEU

from jax_it.errors import UserError
from jax_it.metrics.languages import spaced
from jax_it.metrics.metric import Array, Metric, Predictions, References

# sacrebleu's tokenizer of each BLEU. "13a" cuts at spaces and punctuation, "zh" also Chinese characters one by one,
# "ja-mecab" and "ko-mecab" cut by a dictionary, "flores200" by a model of 200 languages' pieces (spBLEU), and "char"
# takes every character of any script.
TOKENIZERS = {
    "bleu": "13a",
    "bleu_zh": "zh",
    "bleu_ja": "ja-mecab",
    "bleu_ko": "ko-mecab",
    "bleu_char": "char",
    "bleu_flores200": "flores200",
}


def bleu(name: str) -> Metric:
    """Return BLEU (Papineni et al. 2002): case kept, exp smoothing.

    N-grams are matched against all references of an example; the one closest in length counts for brevity.
    """

    def check() -> None:
        _bleu(name)  # load the tokenizer, with the packages or the file that it needs

    return replace(_metric(lambda: _bleu(name), sacrebleu.BLEU(tokenize="none")), check=check)


def chrf() -> Metric:
    """Return chrF2 (Popović 2015), of characters without white space, so for any script; the best reference counts."""
    return _metric(sacrebleu.CHRF, sacrebleu.CHRF())


def ter(of_characters: bool = False) -> Metric:
    """Return TER (Snover et al. 2006): edits to the nearest reference, in percent of its words; a shift is one edit.

    Lower is better, 0 the best, and more than 100 possible. Case aside, words are what stands between
    spaces, or with `of_characters` also each character of `languages.spaced`; of several references, edits
    are divided by their mean length.
    """
    return _metric(sacrebleu.TER, sacrebleu.TER(), spaced if of_characters else None, lower_is_better=True)


def _metric(
    make: Callable[[], SacreBLEU],
    scorer: SacreBLEU,
    prepare: Callable[[str], str] | None = None,
    lower_is_better: bool = False,
) -> Metric:
    # corpus_score is these two steps, which sacrebleu's own bootstrap takes apart in the same way.
    def statistics(predictions: Predictions, references: References) -> Array:
        if prepare:
            predictions = [prepare(text) for text in predictions]
            references = [[prepare(text) for text in texts] for texts in references]
        return np.array(make()._extract_corpus_statistics(predictions, _streams(references)), float)

    def values(sums: Array, examples: int) -> Array:
        return np.array([scorer._compute_score_from_stats(row).score for row in sums.tolist()], float)

    return Metric(statistics, values, lower_is_better)


def _streams(references: References) -> list[tuple[str, ...]]:
    """Return the first reference of each example, then the second of each, …; sacrebleu leaves out a None."""
    return list(zip_longest(*references))


def _bleu(name: str) -> sacrebleu.BLEU:
    tokenizer = TOKENIZERS[name]
    try:
        return sacrebleu.BLEU(tokenize=tokenizer)
    except (RuntimeError, AssertionError, OSError, SystemExit) as error:  # it exits where TLS fails
        reason = " ".join(str(error).split()) or type(error).__name__
        if language := {"ja-mecab": "ja", "ko-mecab": "ko"}.get(tokenizer):
            needs = f"pip install 'jax-it[{language}]'"
            needs = needs if "extra dependencies" in reason else f"{needs} ({reason})"
        else:
            from sacrebleu.tokenizers.tokenizer_spm import SACREBLEU_DIR

            needs = f"the model that it downloads once into {SACREBLEU_DIR}/models is missing or damaged ({reason})"
        raise UserError(f"metric {name!r} needs sacrebleu's tokenizer {tokenizer}: {needs}; or use bleu_char") from None
