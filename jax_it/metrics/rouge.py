"""ROUGE F-measures (Lin 2004) as in `rouge-score`, from 0 to 100: the mean over the examples.

Of several references the best counts, for each type on its own. Words are stemmed (Porter), as in
Tk-Instruct and in Transformers' examples; T5's own evaluation does not stem, and takes the median of
bootstrap samples for the mean. rougeLsum takes lines for sentences;
rougeLsum_sentences first puts each sentence on a line, as published pipelines do (with NLTK) for models whose tokenizer
has no line break, such as T5. Only a-z and 0-9 make words: a text
in another script scores 0, as does an empty one, even against an empty reference. Types that end in
`_chars` are for text in any script: they count the tokens of `languages.characters`, and stem nothing.
"""

import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from jax_it.metrics.languages import characters
from jax_it.metrics.metric import Array, Metric, Predictions, References, percent

# Where a sentence ends within a line: not after an initial or one of a few titles.
_END = re.compile(
    r"""(?:(?<=[.!?])|(?<=[.!?]["')\]]))(?<!\b[A-Z]\.)(?<!\b(?:Mr|Ms|Dr|St|No|vs)\.)(?<!\b(?:Mrs|Gen|Sen|Rep|Gov)\.)\s+"""
    r"""(?=["'(\[]?[A-Z0-9])"""
)
WORDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
CHARACTERS = ("rouge1_chars", "rouge2_chars", "rougeL_chars")
SENTENCES = "rougeLsum_sentences"


def statistics(names: Sequence[str], predictions: Predictions, references: References) -> dict[str, Array]:
    """Return each example's F-measure of each of `names`, each text cut into words and into characters once for all."""
    found: dict[str, Array] = {}
    if SENTENCES in names:
        lines = [_lines(text) for text in predictions], [[_lines(text) for text in texts] for texts in references]
        found[SENTENCES] = statistics(["rougeLsum"], *lines)["rougeLsum"]
    for family, ending in ((WORDS, ""), (CHARACTERS, "_chars")):
        if wanted := [name for name in names if name in family]:
            types = [name.removesuffix(ending) for name in wanted]
            columns = _f_measures(types, bool(ending), predictions, references)
            found |= dict(zip(wanted, columns, strict=True))
    return found


def _lines(text: str) -> str:
    """Return a text with each sentence on a line of its own."""
    return _END.sub("\n", text)


def rouge(name: str) -> Metric:
    """Return one type of ROUGE; `statistics` computes several at once."""
    return Metric(lambda predictions, references: statistics([name], predictions, references)[name], percent)


def _f_measures(
    types: Sequence[str], of_characters: bool, predictions: Predictions, references: References
) -> list[Array]:
    # It imports nltk and with it scipy.stats: a second, which no command should wait for that scores nothing.
    from rouge_score.rouge_scorer import RougeScorer

    tokenizer: Any = SimpleNamespace(tokenize=characters) if of_characters else None
    scorer = RougeScorer(list(types), use_stemmer=not of_characters, tokenizer=tokenizer)
    best = [scorer.score_multi(texts, prediction) for prediction, texts in zip(predictions, references, strict=True)]
    return [np.array([[example[name].fmeasure] for example in best], float) for name in types]
