"""Beam search gives the texts of a plain one written with lists, whatever the other rows are."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_it.data.formats import CausalBatch, Seq2SeqBatch
from jax_it.generation import Engine, Sampling, generate
from jax_it.generation.beam_search import BeamSearch
from jax_it.generation.requests import TextSettings, slot_settings
from tests.generation.conftest import by_prompt

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


def run(
    logits_RVVV: jax.Array,
    cache: Cache,
    first_B: jax.Array,
    search: BeamSearch,
    step: Callable = step,
    limit: int = LENGTH,
) -> jax.Array:
    """The best text [B, T] of each source: the search, on its own."""
    number_B = jnp.zeros(len(first_B), jnp.int32)
    settings = slot_settings([TextSettings(search.sampling, 0, limit, False)] * len(first_B), len(first_B))
    cache = take_rows(cache, jnp.repeat(jnp.arange(len(first_B)), search.num_beams))
    start = search.begin(first_B, None), cache, jnp.repeat(first_B, search.num_beams), number_B, number_B > 0

    def advance(carry: tuple) -> tuple:
        state, cache, last_B, number_B, done_B = carry
        logits_BV, cache = step(last_B, number_B.max(), cache)
        state, last_B, rows_B, over_B = search.advance(state, settings, logits_BV, number_B, done_B, None)
        return state, take_rows(cache, rows_B), last_B, number_B + 1, done_B | over_B

    return search.read(jax.lax.while_loop(lambda carry: ~carry[-1].all(), advance, start)[0])[0][:, 0]


def search(
    logits_RVVV: np.ndarray, length: int = LENGTH, step: Callable = step, end_tokens: tuple = (END,), **settings
) -> list[list[int]]:
    """The text of each row, the end mark with it where there is one."""
    beams = BeamSearch(Sampling(**settings), end_tokens, length)

    def of_chains(logits_RVVV: jax.Array) -> jax.Array:
        cache = Cache(logits_RVVV, jax.vmap(first_token)(logits_RVVV))
        return run(logits_RVVV, cache, jnp.full(len(logits_RVVV), START, jnp.int32), beams, step, length)

    texts = np.asarray(jax.jit(of_chains)(logits_RVVV)).tolist()
    assert all(len(text) == length for text in texts)
    lengths = [next((i + 1 for i, token in enumerate(text) if token in end_tokens), length) for text in texts]
    assert all(set(text[n:]) <= {end_tokens[0]} for text, n in zip(texts, lengths, strict=True))
    return [text[:n] for text, n in zip(texts, lengths, strict=True)]


def plain_beam_search(
    log_probabilities: Callable[[list[int]], np.ndarray],
    num_beams: int,
    length: int,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
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
            at = length if early_stopping == "never" and length_penalty > 0 else number
            hopeless = running[0][0] / at**length_penalty <= ended[-1][0]
            if early_stopping is True or hopeless:
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


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
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

    def of_chains(logits_RVVV: jax.Array) -> jax.Array:
        cache = Cache(logits_RVVV, jnp.zeros(ROWS, jnp.int32))
        return run(
            logits_RVVV, cache, jnp.asarray(first_B, jnp.int32), BeamSearch(Sampling(num_beams=3), (END,), LENGTH)
        )

    def of_row(row: int, text: list[int]) -> np.ndarray:
        before, last = [0, int(first_B[row]), *text][-2:]
        return log_probabilities[row, before, last]

    for row, text in enumerate(np.asarray(jax.jit(of_chains)(chains)).tolist()):
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
    engine = Engine(tiny.model, tiny.mesh, length, 4, Sampling(num_beams=num_beams))
    found = by_prompt(generate(engine, tiny.params, tiny.sources))

    @jax.jit
    def full_pass(source_S: jax.Array, tokens_T: jax.Array) -> jax.Array:
        ones_T = jnp.ones((1, length), jnp.int32)
        segments_S = (jnp.arange(len(source_S)) <= jnp.argmax(source_S == END)).astype(jnp.int32)
        batch = Seq2SeqBatch(
            source_S[None, None],
            segments_S[None, None],
            jnp.arange(len(source_S))[None, None],
            tokens_T[None],
            ones_T,
            ones_T,
            ones_T,
            None,
        )
        return tiny.model.logits(tiny.model.head(tiny.params), tiny.model.hidden_states(tiny.params, batch)[0])[0]

    def log_probabilities(source: list[int], text: list[int]) -> np.ndarray:
        padded = np.array([tiny.model.config.decoder_start_token_id, *text, *[END] * length][:length])
        return log_softmax(np.asarray(full_pass(np.array(source + [0] * (32 - len(source))), padded))[len(text)])

    for i, source in enumerate(tiny.sources[:6]):
        plain = plain_beam_search(partial(log_probabilities, source), num_beams, length)
        assert found[i] == [token for token in plain if token != END]


def test_the_beams_of_a_causal_model_are_those_of_a_plain_search_that_recomputes_each_text(llama):
    length, num_beams = 6, 3
    found = by_prompt(
        generate(Engine(llama.model, llama.mesh, length, 4, Sampling(num_beams=num_beams)), llama.params, llama.sources)
    )

    @jax.jit
    def full_pass(tokens_T: jax.Array, last: jax.Array) -> jax.Array:
        places_T = jnp.arange(len(tokens_T))
        segments_T = (places_T <= last).astype(jnp.int32)
        batch = CausalBatch(tokens_T[None], None, None, segments_T[None], places_T[None], None)
        hidden_TD = llama.model.hidden_states(llama.params, batch)[0][0]
        return llama.model.logits(llama.model.head(llama.params), hidden_TD[last])

    def log_probabilities(prompt: list[int], text: list[int]) -> np.ndarray:
        tokens = np.array([*prompt, *text, *[0] * 40][:40])
        return log_softmax(np.asarray(full_pass(tokens, len(prompt) + len(text) - 1)))

    for i, prompt in enumerate(llama.sources[:6]):
        plain = plain_beam_search(partial(log_probabilities, prompt), num_beams, length)
        assert found[i] == [token for token in plain if token != END]
    assert len({len(text) for text in found.values()}) >= 3
