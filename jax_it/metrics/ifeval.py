"""IFEval (Zhou et al. 2023): whether a text follows instructions that a program can check.

The checks are those of the paper, in the copy that lm_eval keeps (the extra `ifeval`); the counting is ours. A
reference is the JSON text of a row of the data set: {"instruction_id_list": ["punctuation:no_comma", …],
"kwargs": [{…}, …]}; see configs/benchmarks/ifeval.py.
"""

import itertools
import json
import random
from collections.abc import Callable
from functools import lru_cache
from io import StringIO
from typing import Any, NamedTuple

import numpy as np

from jax_it.errors import UserError
from jax_it.metrics.metric import Array, Metric, Predictions, References

DATA = "tokenizers/punkt_tab"  # of NLTK: where sentences end


class _Followed(NamedTuple):
    """Of each of an example's instructions."""

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]  # of the text without asterisks, its first or its last line, too


def by_prompt(loose: bool = False) -> Metric:
    """Return the share of prompts all of whose instructions are followed, from 0 to 100."""
    return Metric(_statistics(loose), lambda sums, examples: 100 * sums[:, 0] / examples)


def by_instruction(loose: bool = False) -> Metric:
    """Return the share of all instructions that are followed, from 0 to 100."""
    return Metric(_statistics(loose), lambda sums, examples: 100 * sums[:, 1] / sums[:, 2])


def both() -> Metric:
    """Return the mean of the two, strict, which is what most model cards call IFEval."""
    return Metric(_statistics(False), lambda sums, examples: 50 * (sums[:, 0] / examples + sums[:, 1] / sums[:, 2]))


def check(name: str) -> None:
    """Load the checks and what they need. Raises UserError."""
    if name in METRICS:
        _checks()


def _statistics(loose: bool) -> Callable[[Predictions, References], Array]:
    """Return for each example whether all is followed, how many of its instructions are, and how many there are."""

    def statistics(predictions: Predictions, references: References) -> Array:
        rows = []
        for i, (text, (reference, *_)) in enumerate(zip(predictions, references, strict=True)):
            try:
                followed = _follow(text, reference)
            except ValueError as error:
                raise UserError(f"metric 'ifeval': the reference of example {i} {error}") from None
            flags = followed.loose if loose else followed.strict
            rows.append((all(flags), sum(flags), len(flags)))
        return np.array(rows, float)

    return statistics


@lru_cache(maxsize=1 << 16)  # the five metrics look at the same texts
def _follow(text: str, reference: str) -> _Followed:
    texts = variants(text)
    strict, loose = [], []
    for name, settings in _read(reference):
        follows = _checks()[name](name)
        state = random.getstate()
        random.seed(0)  # a check that lacks a setting draws one: always the same
        try:
            follows.build_description(**settings)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"has settings that {name} does not take: {' '.join(str(error).split())}") from None
        finally:
            random.setstate(state)
        strict.append(bool(text.strip() and follows.check_following(text)))
        loose.append(any(bool(each.strip() and follows.check_following(each)) for each in texts))
    return _Followed(tuple(strict), tuple(loose))


def variants(text: str) -> list[str]:
    """Return the texts of which one must follow an instruction for the loose accuracy (section 2.2 of the paper).

    They forgive the marks of Markdown's emphasis, an opening line such as "Sure, here it is:", and a closing one.
    """
    lines = text.split("\n")
    parts = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    return [each for whole in (text, *parts) for each in (whole, whole.replace("*", ""))]


def _read(reference: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the names of the instructions with their settings."""
    template = '{{prompt}} ||| {{ {"instruction_id_list": instruction_id_list, "kwargs": kwargs} | tojson }}'
    try:
        row = json.loads(reference)
        pairs = list(zip(row["instruction_id_list"], row["kwargs"], strict=True))
        # The data set of the hub gives every setting that there is, most of them null.
        found = [(name, {key: value for key, value in settings.items() if value}) for name, settings in pairs]
    except (ValueError, KeyError, TypeError, AttributeError):
        found = []
    if not found:
        raise ValueError(f"is not the JSON of instruction_id_list and kwargs, one for each; the template is {template}")
    for name, _ in found:
        if name not in _checks():
            raise ValueError(f"has an instruction that is not known: {name!r}")
    return found


@lru_cache(maxsize=1)
def _checks() -> dict[str, Callable[[str], Any]]:
    """Return the paper's checks by name. Raises UserError where a package or NLTK's data is missing."""
    try:
        import immutabledict  # noqa: F401
        import langdetect
        import nltk

        _find_sentences(nltk)
        from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT
    except ModuleNotFoundError as error:
        raise UserError(f"metric 'ifeval' needs {error.name}: pip install 'jax-it[ifeval]'") from None
    langdetect.DetectorFactory.seed = 0  # it guesses otherwise each time anew
    return dict(INSTRUCTION_DICT)


def _find_sentences(nltk: Any) -> None:
    """NLTK's data, which it downloads once. The checks' own module would go on without."""
    for tries in itertools.count():
        try:
            nltk.data.find(DATA)
            return
        except LookupError:
            if tries or not nltk.download("punkt_tab", quiet=True, print_error_to=StringIO()):
                raise UserError(
                    "metric 'ifeval' needs NLTK's data punkt_tab, which could not be downloaded; on a machine with a "
                    "network: python -m nltk.downloader -d FOLDER punkt_tab; then set NLTK_DATA=FOLDER here"
                ) from None


METRICS = {
    "ifeval": both(),
    "ifeval.prompt_strict": by_prompt(),
    "ifeval.instruction_strict": by_instruction(),
    "ifeval.prompt_loose": by_prompt(loose=True),
    "ifeval.instruction_loose": by_instruction(loose=True),
}
