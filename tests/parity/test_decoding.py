"""Decoding token by token, for every family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_it import config, sharding
from jax_it.generation import Engine, Request, Sampling, Scheduler, generate
from tests.generation.conftest import by_prompt
from tests.parity import cases, pytorch, references, seq2seq_cases, texts
from tests.parity.causal_cases import CausalInputs
from tests.parity.test_stored import TOLERANCE

SLOW = pytest.mark.slow  # each way of decoding is compiled


def test_cached_decoding_gives_the_logits_of_the_full_forward_pass_at_every_position(loaded, ours):
    model, given = loaded.model, loaded.given
    if isinstance(given, CausalInputs):
        # Prompts of several lengths, so that each row is at a position of its own.
        lengths_B, starts_B = given.mask_BT.sum(1), np.array([9, 6, 2])
        prompts_BS = given.tokens_BT[:, : starts_B.max()]
        segments_BS = (np.arange(starts_B.max()) < starts_B[:, None]).astype(np.int32)
        tokens_BT, delays_B = given.tokens_BT, np.zeros(3, np.int32)
        firsts_B = starts_B - 1  # the first step takes the prompt's last token
    else:
        lengths_B, prompts_BS, segments_BS = given.mask_BT.sum(1), given.source_BS, given.source_mask_BS
        tokens_BT, delays_B = loaded.batch.tokens_BT, np.array([0, 2, 5])  # rows that start so many steps late
        firsts_B = np.zeros(3, np.int32)
    rows, steps = np.arange(3), int((lengths_B - firsts_B + delays_B).max())
    tokens_BT = jnp.asarray(tokens_BT)

    @jax.jit
    def decode(params):
        prepared = model.prepare_for_decoding(params)

        def step(cache, number):
            positions_B = jnp.clip(firsts_B + number - delays_B, firsts_B, lengths_B - 1)
            logits_BV, cache = model.decode_step(prepared, tokens_BT[rows, positions_B], positions_B, cache)
            return cache, logits_BV

        first_tokens_B, first_positions_B, cache = model.prefill(params, prompts_BS, segments_BS, steps)
        return first_tokens_B, first_positions_B, jax.lax.scan(step, cache, jnp.arange(steps))[1]

    first_tokens_B, first_positions_B, logits_XBV = map(np.asarray, decode(loaded.params))
    np.testing.assert_array_equal(first_positions_B, firsts_B)
    np.testing.assert_array_equal(first_tokens_B, tokens_BT[rows, firsts_B])
    for row in rows:
        stepwise_TV = logits_XBV[delays_B[row] : delays_B[row] + lengths_B[row] - firsts_B[row], row]
        full_TV = ours.logits_BTV[row, firsts_B[row] : lengths_B[row]]
        np.testing.assert_allclose(stepwise_TV, full_TV, rtol=0, atol=TOLERANCE)


def generated(loaded, prompts, length, eos_ids=(), **sampling):
    """The tokens that jax_it's engine gives for each source or prompt, all in one batch."""
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    engine = Engine(loaded.model, mesh, length, len(prompts), Sampling(**sampling), eos_ids)
    found = by_prompt(generate(engine, loaded.params, prompts))
    return [found[i] for i in range(len(prompts))]


def until_end(texts_BT, ends):
    """Stored texts without their end tokens and what follows."""
    return [[token for token in text if token not in (*ends, pytorch.NONE)] for text in texts_BT.tolist()]


def test_greedy_texts_are_those_of_transformers(loaded):
    given = loaded.given
    if isinstance(given, CausalInputs):
        sources, length = given.prompts, pytorch.NEW_TOKENS["causal"]
    else:
        sources = [row[:n].tolist() for row, n in zip(given.source_BS, seq2seq_cases.SOURCE_LENGTHS, strict=True)]
        length = pytorch.NEW_TOKENS["seq2seq"]
    expected = until_end(references.read(loaded.case).texts["greedy"], loaded.case.end_tokens)
    assert generated(loaded, sources, length) == expected


@pytest.mark.parametrize(
    "case, name",
    [
        pytest.param(cases.BY_NAME[case], name, id=f"{case}-{name}", marks=() if (case, name) in texts.QUICK else SLOW)
        for case in texts.CASES
        for name in texts.SETTINGS
    ],
    indirect=["case"],
)
def test_texts_under_each_setting_are_those_of_transformers(loaded, name):
    ends = texts.ends(loaded.case)
    found = generated(loaded, texts.prompts(loaded.case), texts.LENGTH, ends, **texts.SETTINGS[name])
    assert found == until_end(references.read(loaded.case).texts[name], ends)


@pytest.mark.parametrize(
    "case", [cases.BY_NAME[name] for name in ("t5_1_1", "llama3", "gemma2")], indirect=True, ids=lambda case: case.name
)
def test_texts_of_mixed_settings_that_arrive_at_any_time_are_those_of_transformers(loaded):
    """In few slots of one server; longer prompts are prefilled in chunks."""
    ends, prompts = texts.ends(loaded.case), texts.prompts(loaded.case)
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    engine = Engine(loaded.model, mesh, texts.LENGTH, 3, eos_ids=ends, prefill_chunk=16).load(loaded.params)
    engine.warm_up(32)
    settings = {"plain": {}, **texts.RULES}
    waiting = [
        (name, Request(len(prompts) * k + i, prompt, sampling=Sampling(**settings[name])))
        for k, name in enumerate(settings)
        for i, prompt in enumerate(prompts)
    ]
    names = {request.request_id: name for name, request in waiting}
    rng, scheduler, found = np.random.default_rng(0), Scheduler(engine, stream_interval=1), {}
    rng.shuffle(waiting)
    while waiting or scheduler.has_unfinished:
        for _ in range(min(len(waiting), rng.integers(0, 3))):
            scheduler.add_request(waiting.pop()[1])
        found |= {output.request_id: output.tokens for output in scheduler.step() if output.finish_reason}
    stored = references.read(loaded.case).texts
    expected = {name: until_end(stored[name], ends) for name in settings}
    for i, tokens in found.items():
        assert tokens == expected[names[i]][i % len(prompts)], (names[i], i % len(prompts))
    assert len(found) == len(names)


@pytest.mark.parametrize("name", texts.CASES)
def test_the_settings_make_a_difference(name):
    stored = references.read(cases.BY_NAME[name]).texts
    found = {key: stored[key].tobytes() for key in texts.SETTINGS}
    assert len(set(found.values())) >= 20
    assert len({found[key] for key in texts.BEAMS}) >= 12
    assert any(found[key] != found[f"{key}_early"] for key in texts.BEAMS if f"{key}_early" in found)
