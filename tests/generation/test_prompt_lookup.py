"""Prompt lookup gives the texts of greedy decoding, in fewer steps, from drafts that a plain search finds too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_it.errors import UserError
from jax_it.generation import Engine, Request, Sampling, Scheduler, generate, prompt_lookup
from jax_it.generation.prompt_lookup import LONGEST_NGRAM, SHORTEST_NGRAM
from jax_it.generation.requests import TextSettings, slot_settings
from jax_it.generation.sampling import Sampler
from jax_it.generation.slots import SlotState
from jax_it.models.kv_cache import KVCache
from tests.generation.conftest import by_prompt

LENGTH = 24
ENDLESS = Sampling(ignore_eos=True)  # texts of random weights repeat themselves after a while
DRAFT = 4


@pytest.fixture(scope="module")
def repeating(llama) -> list[list[int]]:
    """Prompts that hold what greedy decoding of each continues with, so that drafts are right, for a while at least."""
    engine = Engine(llama.model, llama.mesh, LENGTH, 8, ENDLESS)
    texts = by_prompt(generate(engine, llama.params, llama.sources))
    return [[*llama.sources[i], *texts[i], *llama.sources[i]] for i in range(len(texts))] + llama.sources


@pytest.fixture(scope="module")
def engine(llama) -> Engine:
    return Engine(llama.model, llama.mesh, LENGTH, 6, Sampling(prompt_lookup_num_tokens=DRAFT))


@pytest.fixture(scope="module")
def plain(llama) -> Engine:
    return Engine(llama.model, llama.mesh, LENGTH, 6)


def test_the_texts_are_those_of_greedy_decoding(llama, repeating, plain, engine):
    expected, found = (
        {output.request_id: output for output in generate(each, llama.params, repeating)} for each in (plain, engine)
    )
    assert found == expected
    assert len({tuple(output.tokens) for output in found.values()}) > len(llama.sources) // 2
    assert {"stop", "length"} == {output.finish_reason for output in found.values()}


def test_requests_with_limits_and_others_that_are_drawn_get_their_texts_beside_it(llama, repeating, plain, engine):
    drawn = Sampling(temperature=1.0, seed=3)

    def texts(engine: Engine) -> dict[int, list[int]]:
        scheduler = Scheduler(engine.load(llama.params), stream_interval=2)
        found, waiting = {}, list(enumerate(repeating))
        while waiting or scheduler.has_unfinished:
            for i, prompt in waiting[:3]:
                sampling = drawn if i % 5 == 4 else None
                scheduler.add_request(Request(i, prompt, max_new_tokens=1 + i, sampling=sampling, index=i))
            del waiting[:3]
            found |= {output.request_id: output.tokens for output in scheduler.step()}
        return found

    assert texts(engine) == texts(plain)


def test_a_right_draft_saves_steps(llama, repeating):
    steps, texts = {}, {}
    for number in (0, DRAFT):
        sampling = ENDLESS._replace(prompt_lookup_num_tokens=number)
        scheduler = Scheduler(Engine(llama.model, llama.mesh, LENGTH, 1, sampling).load(llama.params), 1)
        scheduler.add_request(Request(0, repeating[3]))
        steps[number] = 0
        while scheduler.has_unfinished:
            texts[number] = [output.tokens for output in scheduler.step()][-1]
            steps[number] += 1
    assert texts[DRAFT] == texts[0]
    assert steps[0] == LENGTH
    assert steps[DRAFT] <= LENGTH / 2


def search(text: list[int], most: int) -> list[int]:
    """The draft by a plain search: after the first occurrence of the longest n-gram at the end."""
    for n in range(min(LONGEST_NGRAM, len(text)), SHORTEST_NGRAM - 1, -1):
        for start in range(len(text) - n):
            if text[start : start + n] == text[-n:]:
                return text[start + n : start + n + most]
    return []


def test_drafts_are_those_of_a_plain_search():
    rng, rows, width, new = np.random.default_rng(0), 64, 20, 12
    starts, numbers = rng.integers(0, width, rows), rng.integers(0, new, rows)
    limits = np.minimum(numbers + rng.integers(1, new, rows), new)
    texts = [rng.integers(0, 3, start + 1 + number).tolist() for start, number in zip(starts, numbers, strict=True)]
    prompts_BT, tokens_BT = np.zeros((rows, width + new), np.int32), np.full((rows, new), 1, np.int32)
    for row, (start, text) in enumerate(zip(starts, texts, strict=True)):
        prompts_BT[row, : start + 1], tokens_BT[row, : len(text) - start - 1] = text[: start + 1], text[start + 1 :]
    sampler = Sampler((1,), new, prompt_lookup_num_tokens=DRAFT)
    settings = slot_settings([TextSettings(ENDLESS, 0, int(limit), False) for limit in limits], rows)
    cache = KVCache((), width + new, (), prompts=jnp.asarray(prompts_BT))
    last_B, texts_state = jnp.asarray([text[-1] for text in texts]), sampler.begin(jnp.zeros(rows), jnp.zeros(rows))
    state = SlotState(
        cache, last_B, jnp.asarray(starts), jnp.asarray(numbers), settings, jnp.zeros(rows, bool),
        texts_state._replace(tokens_BT=jnp.asarray(tokens_BT)),
    )  # fmt: skip
    drafts_BK, drafted_B = jax.jit(prompt_lookup._drafts, static_argnums=0)(sampler, state)
    found = [draft[:drafted].tolist() for draft, drafted in zip(drafts_BK, drafted_B, strict=True)]
    expected = [
        search(text, min(DRAFT, limit - number - 1)) for text, number, limit in zip(texts, numbers, limits, strict=True)
    ]
    assert found == expected
    assert 0 < sum(not draft for draft in found) < rows / 2


@pytest.mark.parametrize(
    "settings", [{"num_beams": 2}, {"temperature": 1.0}, {"repetition_penalty": 1.2}, {"min_new_tokens": 3}]
)
def test_it_is_refused_where_texts_are_not_greedy(llama, settings):
    with pytest.raises(UserError, match="prompt_lookup_num_tokens 4: it is for greedy decoding"):
        Engine(llama.model, llama.mesh, LENGTH, 4, Sampling(prompt_lookup_num_tokens=4, **settings))


def test_it_is_refused_for_an_encoder_decoder(tiny):
    with pytest.raises(UserError, match="it is for causal models without sliding windows"):
        Engine(tiny.model, tiny.mesh, LENGTH, 4, Sampling(prompt_lookup_num_tokens=4))
