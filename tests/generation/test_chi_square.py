"""Texts are drawn with the probabilities that the filters leave: chi-square tests of many draws by the `Engine`.

What is exact comes from a full forward pass and from filters written anew, in float64: every text of two tokens
(or of one, the end mark) has its probability. A test fails if the chance of such counts is below `ALARM`; the last
tests show that this seldom happens by chance, and that wrong probabilities do not pass.
"""

from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np
import pytest
import scipy.stats

from jax_it.data.formats import CausalBatch, Seq2SeqBatch
from jax_it.generation import Engine, Sampling, generate

ALARM = 1e-7  # for each of the fewer than ten tests: one false alarm in a million seeds
PROMPTS, SAMPLES, SLOTS = 64, 128, 512
DRAWS = PROMPTS * SAMPLES
SAMPLINGS = {
    "temperature": Sampling(temperature=0.6, seed=1),
    "top_k": Sampling(temperature=1.2, top_k=6, seed=2),
    "top_p": Sampling(temperature=0.9, top_p=0.7, seed=3),
    "min_p": Sampling(temperature=1.0, min_p=0.15, seed=4),
    "all": Sampling(temperature=1.3, top_k=12, top_p=0.8, min_p=0.3, repetition_penalty=1.4, seed=5),
}
Probabilities = dict[tuple[int, ...], float]


def filtered(logits_V: np.ndarray, sampling: Sampling, seen: Sequence[int]) -> np.ndarray:
    """The probabilities of the next token, in float64: penalty, temperature, top-k, top-p, min-p."""
    logits_V = logits_V.astype(np.float64)
    for token in set(seen):
        change = sampling.repetition_penalty
        logits_V[token] *= change if logits_V[token] < 0 else 1 / change
    order = np.argsort(-logits_V)
    probabilities = np.exp((logits_V - logits_V.max()) / sampling.temperature)[order]
    if sampling.top_k:
        probabilities[sampling.top_k :] = 0
    probabilities /= probabilities.sum()
    before = np.cumsum(probabilities) - probabilities
    probabilities[(before >= sampling.top_p) & (np.arange(len(order)) > 0)] = 0
    probabilities[probabilities < sampling.min_p * probabilities[0]] = 0
    found_V = np.zeros_like(probabilities)
    found_V[order] = probabilities / probabilities.sum()
    return found_V


def next_logits(tiny, texts: list[list[int]]) -> np.ndarray:
    """The logits [text, V] of the token after each of several texts, as long as each other, by full forward passes."""
    prompt, model = tiny.sources[1], tiny.model
    if model.kind == "seq2seq":
        tokens_BT = np.array([[model.config.decoder_start_token_id, *text] for text in texts])
        source = np.tile(np.array(prompt), (len(texts), 1, 1))
        ones_BT = np.ones_like(tokens_BT)
        positions = np.zeros_like(source)
        batch = Seq2SeqBatch(source, np.ones_like(source), positions, tokens_BT, ones_BT, ones_BT, ones_BT, None)
    else:
        tokens_BT = np.array([[*prompt, *text] for text in texts])
        positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape)
        batch = CausalBatch(tokens_BT, None, None, np.ones_like(tokens_BT), positions_BT)
    hidden_BTD = jax.jit(model.hidden_states)(tiny.params, batch)[0]
    return np.asarray(model.logits(model.head(tiny.params), hidden_BTD[:, -1]))


@pytest.fixture(scope="module", params=["tiny", "llama"])
def subject(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def logits(subject) -> tuple[np.ndarray, np.ndarray]:
    """Those of the first token [V], and of the second after each first [V, V]."""
    vocabulary = subject.model.config.vocab_size
    return next_logits(subject, [[]])[0], next_logits(subject, [[token] for token in range(vocabulary)])


def exact(subject, logits, sampling: Sampling) -> Probabilities:
    """Of all texts; one that ends at once is the end mark."""
    first_V, second_VV = logits
    (end,) = subject.model.config.eos_token_ids
    seen = subject.sources[1] if subject.model.kind == "causal" else [subject.model.config.decoder_start_token_id]
    found = {}
    for token, probability in enumerate(filtered(first_V, sampling, seen)):
        if token == end:
            found[(end,)] = probability
        else:
            rest_V = filtered(second_VV[token], sampling, [*seen, token])
            found |= {(token, other): probability * p for other, p in enumerate(rest_V)}
    return {text: probability for text, probability in found.items() if probability > 0}


def chance(counts: Counter, probabilities: Probabilities) -> float:
    """The chance of counts as unlikely as these or more; 0 where something was drawn that cannot be.

    Texts of fewer than 10 expected draws count together, likeliest first.
    """
    if counts.keys() - probabilities.keys():
        return 0.0
    draws = sum(counts.values())
    cells: list[list[float]] = [[0.0, 0.0]]
    for text, probability in sorted(probabilities.items(), key=lambda item: -item[1]):
        if cells[-1][1] >= 10:
            cells.append([0.0, 0.0])
        cells[-1][0] += counts[text]
        cells[-1][1] += draws * probability
    if len(cells) > 1 and cells[-1][1] < 10:
        seen, expected = cells.pop()
        cells[-1] = [cells[-1][0] + seen, cells[-1][1] + expected]
    seen, expected = np.array(cells).T
    return float(scipy.stats.chi2.sf(((seen - expected) ** 2 / expected).sum(), len(cells) - 1))


@pytest.fixture(scope="module")
def drawn(request, subject) -> tuple[Sampling, list[tuple[int, ...]]]:
    """Many texts of one prompt, which stands several times in the list, in the order of their numbers."""
    sampling = SAMPLINGS[request.param]
    (end,) = subject.model.config.eos_token_ids
    engine = Engine(subject.model, subject.mesh, 2, SLOTS, sampling._replace(num_samples=SAMPLES))
    texts = sorted(generate(engine, subject.params, [subject.sources[1]] * PROMPTS), key=lambda text: text[:2])
    assert [text[:2] for text in texts] == [(i, sample) for i in range(PROMPTS) for sample in range(SAMPLES)]
    return sampling, [tuple([*text.tokens, end][:2]) for text in texts]


# Each of T5's, and of a causal model's the one that has all.
DRAWN = pytest.mark.parametrize(
    "subject, drawn", [*(("tiny", name) for name in SAMPLINGS), ("llama", "all")], indirect=True
)


@DRAWN
def test_texts_are_drawn_with_their_exact_probabilities(subject, logits, drawn):
    sampling, texts = drawn
    probabilities = exact(subject, logits, sampling)
    assert len(probabilities) >= 15
    assert chance(Counter(texts), probabilities) > ALARM


@DRAWN
def test_texts_of_one_prompt_and_of_neighbours_are_independent(subject, logits, drawn):
    """Pairs of first tokens, of samples side by side and of the same sample of prompts side by side."""
    sampling, texts = drawn
    firsts = [text[0] for text in texts]
    singles: Counter = Counter()
    for text, probability in exact(subject, logits, sampling).items():
        singles[text[0]] += probability
    pairs = {(a, b): p * q for a, p in singles.items() for b, q in singles.items()}
    for distance in (1, SAMPLES):
        disjoint = [i for i in range(DRAWS) if i // distance % 2 == 0]
        assert chance(Counter((firsts[i], firsts[i + distance]) for i in disjoint), pairs) > ALARM


WRONG = {
    "a temperature that is 10 % too high": ("all", lambda right: right._replace(temperature=1.1 * right.temperature)),
    "one token more": ("top_k", lambda right: right._replace(top_k=right.top_k + 1)),
    "one token less": ("top_k", lambda right: right._replace(top_k=right.top_k - 1)),
    "2 % more": ("top_p", lambda right: right._replace(top_p=right.top_p + 0.02)),
    "no min-p": ("min_p", lambda right: right._replace(min_p=0.0)),
    "no penalty": ("all", lambda right: right._replace(repetition_penalty=1.0)),
}


@pytest.mark.parametrize("subject", ["tiny"], indirect=True)
@pytest.mark.parametrize("what", WRONG)
def test_wrong_probabilities_do_not_pass(subject, logits, what):
    """Draws of a engine in numpy that makes the mistake."""
    name, mistake = WRONG[what]
    right, wrong = (exact(subject, logits, sampling) for sampling in (SAMPLINGS[name], mistake(SAMPLINGS[name])))
    rng = np.random.default_rng(0)
    for _ in range(5):
        assert chance(_draw(rng, wrong), right) < ALARM
        assert chance(_draw(rng, right), right) > ALARM


@pytest.mark.parametrize("subject", ["tiny"], indirect=True)
def test_a_second_draw_with_the_first_ones_randomness_does_not_pass(subject, logits):
    """Each token alone has the right probabilities then."""
    first_V, second_VV = logits
    sampling = SAMPLINGS["temperature"]
    (end,) = subject.model.config.eos_token_ids
    rng = np.random.default_rng(0)
    counts: Counter = Counter()
    firsts_V = np.cumsum(filtered(first_V, sampling, []))
    for uniform in rng.random(DRAWS):
        first = int(np.searchsorted(firsts_V, uniform))
        seconds_V = np.cumsum(filtered(second_VV[first], sampling, []))
        counts[(end,) if first == end else (first, int(np.searchsorted(seconds_V, uniform)))] += 1
    assert chance(counts, exact(subject, logits, sampling)) < ALARM


@pytest.mark.parametrize("subject", ["tiny"], indirect=True)
def test_chances_under_the_right_probabilities_are_spread_evenly(subject, logits):
    """So an alarm is as rare as it says: the approximation by the chi-square distribution holds."""
    probabilities = exact(subject, logits, SAMPLINGS["all"])
    rng = np.random.default_rng(0)
    found = np.array([chance(_draw(rng, probabilities), probabilities) for _ in range(400)])
    assert scipy.stats.kstest(found, "uniform").pvalue > 1e-3
    assert found.min() > 1e-5


def _draw(rng: np.random.Generator, probabilities: Probabilities) -> Counter:
    numbers = rng.multinomial(DRAWS, np.array(list(probabilities.values())) / sum(probabilities.values()))
    return Counter({text: int(number) for text, number in zip(probabilities, numbers, strict=True) if number})
