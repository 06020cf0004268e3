"""Beam search gives the texts of a plain one written with lists, whatever the rows' company."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_it.data.batches import CausalBatch, Seq2SeqBatch
from jax_it.generation import Generator, Sampling
from jax_it.generation.beam import beam_search

START, END, VOCABULARY, ROWS, LENGTH = 0, 1, 12, 40, 8


class Cache(NamedTuple):
    """That of a chain whose next token depends on the source, the token before the last one, and the last one.

    Before the start mark stands a token of the source's own: what a prefilled cache holds.
    """

    logits_RVVV: jax.Array  # of each source, shared by its beams
    before_B: jax.Array


def step(tokens_B: jax.Array, number: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    sources, rows = cache.logits_RVVV.shape[0], tokens_B.shape[0]
    source_B = jnp.arange(rows) // (rows // sources)
    return cache.logits_RVVV[source_B, cache.before_B, tokens_B], Cache(cache.logits_RVVV, tokens_B)


def take_rows(cache: Cache, rows_B: jax.Array) -> Cache:
    return Cache(cache.logits_RVVV, cache.before_B[rows_B])


def first_token(logits_VVV: Any) -> Any:
    """The one before the start mark: any that follows from the chain."""
    return logits_VVV[START, START].argmax()


def search(logits_RVVV: np.ndarray, length: int = LENGTH, step: Callable = step, **settings) -> list[list[int]]:
    """The text of each row, the end mark with it where there is one."""

    ends = settings.setdefault("end_tokens", (END,))

    def run(logits_RVVV: jax.Array) -> jax.Array:
        cache = Cache(logits_RVVV, jax.vmap(first_token)(logits_RVVV))
        first_B = jnp.full(len(logits_RVVV), START, jnp.int32)
        return beam_search(step, take_rows, cache, first_B=first_B, length=length, **settings)

    texts = np.asarray(jax.jit(run)(logits_RVVV)).tolist()
    assert all(len(text) == length for text in texts)
    lengths = [next((i + 1 for i, token in enumerate(text) if token in ends), length) for text in texts]
    assert all(set(text[n:]) <= {ends[0]} for text, n in zip(texts, lengths, strict=True))
    return [text[:n] for text, n in zip(texts, lengths, strict=True)]


def plain_beam_search(
    log_probabilities: Callable[[list[int]], np.ndarray],
    num_beams: int,
    length: int,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    end_tokens: tuple[int, ...] = (END,),
) -> list[int]:
    """The text that beam search finds, with the end mark; `log_probabilities` are those of the token after a text."""

    def has_ended(text: list[int]) -> bool:
        return text[-1] in end_tokens or len(text) == length

    running: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int]]] = []
    for number in range(1, length + 1):
        longer = [
            (score + more, [*text, token])
            for score, text in running
            for token, more in enumerate(log_probabilities(text).tolist())
        ]
        candidates = sorted(longer, reverse=True)[: (1 + len(end_tokens)) * num_beams]
        ended += [(score / number**length_penalty, text) for score, text in candidates[:num_beams] if has_ended(text)]
        ended = sorted(ended, reverse=True)[:num_beams]
        running = [(score, text) for score, text in candidates if not has_ended(text)][:num_beams]
        if len(ended) == num_beams and running:
            hopeless = running[0][0] / number**length_penalty <= ended[-1][0]
            if early_stopping or hopeless:
                break
    return ended[0][1]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def after(log_probabilities_VVV: np.ndarray, text: list[int]) -> np.ndarray:
    before, last = [first_token(log_probabilities_VVV), START, *text][-2:]
    return log_probabilities_VVV[before, last]


@pytest.fixture(scope="module")
def chains() -> np.ndarray:
    """Logits of the chains of ROWS sources; in some the end mark comes at once, in some never."""
    rng = np.random.default_rng(0)
    logits_RVVV = rng.normal(0, 1.5, (ROWS, VOCABULARY, VOCABULARY, VOCABULARY)).astype(np.float32)
    logits_RVVV[..., END] += np.linspace(-4, 6, ROWS)[:, None, None]
    return logits_RVVV


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("length_penalty", [0.6, 1.0, 2.0])
@pytest.mark.parametrize("num_beams", [2, 5])
def test_the_texts_are_those_of_a_plain_beam_search(chains, num_beams, length_penalty, early_stopping):
    settings = {"num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": early_stopping}
    found = search(chains, **settings)
    plain = [plain_beam_search(partial(after, chain), length=LENGTH, **settings) for chain in log_softmax(chains)]
    assert found == plain
    assert len({len(text) for text in found}) >= 4, "texts of many lengths, or the test shows little"


@pytest.mark.parametrize("end_tokens", [(END, 5), (7, END, 3)])
def test_a_text_ends_at_any_of_several_end_marks(chains, end_tokens):
    found = search(chains, num_beams=3, end_tokens=end_tokens)
    plain = [
        plain_beam_search(partial(after, chain), 3, LENGTH, end_tokens=end_tokens) for chain in log_softmax(chains)
    ]
    assert found == plain
    assert {text[-1] for text in found} >= set(end_tokens), "each mark ends some text, or the test shows little"


def test_each_row_goes_on_from_a_first_token_of_its_own(chains):
    """The chain's next token depends on the first one, so another row's would be noticed."""
    first_B = np.arange(ROWS) % VOCABULARY
    log_probabilities = log_softmax(chains)

    def run(logits_RVVV: jax.Array) -> jax.Array:
        cache = Cache(logits_RVVV, jnp.zeros(ROWS, jnp.int32))
        settings = {"length": LENGTH, "num_beams": 3, "end_tokens": (END,)}
        return beam_search(step, take_rows, cache, first_B=jnp.asarray(first_B, jnp.int32), **settings)

    def of_row(row: int, text: list[int]) -> np.ndarray:
        before, last = [0, int(first_B[row]), *text][-2:]
        return log_probabilities[row, before, last]

    for row, text in enumerate(np.asarray(jax.jit(run)(chains)).tolist()):
        plain = plain_beam_search(partial(of_row, row), 3, LENGTH)
        assert text == plain + [END] * (LENGTH - len(plain))


def test_each_setting_changes_some_text(chains):
    settings = [
        {"num_beams": 2},
        {"num_beams": 4},
        {"num_beams": 4, "length_penalty": 2.0},
        {"num_beams": 4, "early_stopping": True},
    ]
    found = [search(chains, **setting) for setting in settings]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])


def test_one_beam_is_greedy_decoding(chains):
    greedy = []
    for chain in chains:
        text: list[int] = []
        while len(text) < LENGTH and END not in text:
            text.append(int(after(chain, text).argmax()))
        greedy.append(text)
    assert search(chains, num_beams=1) == greedy
    assert search(chains, num_beams=1, length_penalty=2.0) == greedy


def test_enough_beams_find_the_likeliest_text_of_all():
    vocabulary, length = 4, 3
    rng = np.random.default_rng(1)
    chains = rng.normal(0, 1, (ROWS, vocabulary, vocabulary, vocabulary)).astype(np.float32)

    def best(chain: np.ndarray, text: list[int], score: float) -> tuple[float, list[int]]:
        if text and (text[-1] == END or len(text) == length):
            return score, text
        more = after(chain, text).tolist()
        return max(best(chain, [*text, token], score + more[token]) for token in range(vocabulary))

    likeliest = [best(chain, [], 0.0)[1] for chain in log_softmax(chains)]
    assert search(chains, length, num_beams=vocabulary**2, length_penalty=0.0) == likeliest


@pytest.mark.parametrize("early_stopping", [False, True])
def test_a_row_alone_gets_the_text_that_it_gets_among_others(chains, early_stopping):
    together = search(chains, num_beams=3, early_stopping=early_stopping)
    for rows in (slice(20, 21), slice(8, 30, 2)):
        assert search(chains[rows], num_beams=3, early_stopping=early_stopping) == together[rows]


def test_a_text_of_one_token_is_the_likeliest_token(chains):
    assert search(chains, 1, num_beams=4) == [[int(after(chain, []).argmax())] for chain in chains]


def test_the_search_ends_once_every_row_is_closed(chains):
    steps: list[int] = []

    def counted(tokens_B: jax.Array, number: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        jax.debug.callback(lambda number: steps.append(int(number)), number)
        return step(tokens_B, number, cache)

    eager = chains.copy()
    eager[..., END] = 20.0  # the end mark is all but certain, then two thirds of the beams' next token
    texts = search(eager, num_beams=3, step=counted)
    jax.effects_barrier()
    assert texts == [[END]] * ROWS
    # One text ends at the first position, and one for each of the three that go on at the second.
    assert sorted(steps) == [0, 1]


def test_the_beams_of_a_t5_are_those_of_a_plain_search_that_recomputes_each_text(tiny):
    length, num_beams = 6, 3
    generator = Generator(tiny.model, tiny.mesh, length, 4, Sampling(num_beams=num_beams))
    found = dict(generator(tiny.params, tiny.sources))

    @jax.jit
    def full_pass(source_S: jax.Array, tokens_T: jax.Array) -> jax.Array:
        ones_T = jnp.ones((1, length), jnp.int32)
        segments_S = (jnp.arange(len(source_S)) <= jnp.argmax(source_S == END)).astype(jnp.int32)
        batch = Seq2SeqBatch(
            source_S[None, None], segments_S[None, None], None, tokens_T[None], ones_T, ones_T, ones_T, None
        )
        return tiny.model.logits(tiny.model.head(tiny.params), tiny.model.apply(tiny.params, batch))[0]

    def log_probabilities(source: list[int], text: list[int]) -> np.ndarray:
        padded = np.array([tiny.model.config.start_token, *text, *[END] * length][:length])
        return log_softmax(np.asarray(full_pass(np.array(source + [0] * (32 - len(source))), padded))[len(text)])

    for i, source in enumerate(tiny.sources[:6]):
        plain = plain_beam_search(partial(log_probabilities, source), num_beams, length)
        assert found[i] == [token for token in plain if token != END]


def test_the_beams_of_a_causal_model_are_those_of_a_plain_search_that_recomputes_each_text(llama):
    length, num_beams = 6, 3
    found = dict(
        Generator(llama.model, llama.mesh, length, 4, Sampling(num_beams=num_beams))(llama.params, llama.sources)
    )

    @jax.jit
    def full_pass(tokens_T: jax.Array, last: jax.Array) -> jax.Array:
        places_T = jnp.arange(len(tokens_T))
        segments_T = (places_T <= last).astype(jnp.int32)
        batch = CausalBatch(tokens_T[None], None, None, segments_T[None], places_T[None], None)
        hidden_TD = llama.model.apply(llama.params, batch)[0]
        return llama.model.logits(llama.model.head(llama.params), hidden_TD[last])

    def log_probabilities(prompt: list[int], text: list[int]) -> np.ndarray:
        tokens = np.array([*prompt, *text, *[0] * 40][:40])
        return log_softmax(np.asarray(full_pass(tokens, len(prompt) + len(text) - 1)))

    for i, prompt in enumerate(llama.sources[:6]):
        plain = plain_beam_search(partial(log_probabilities, prompt), num_beams, length)
        assert found[i] == [token for token in plain if token != END]
    assert len({len(text) for text in found.values()}) >= 3
