"""Decoding token by token, for every family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_it import config, sharding
from jax_it.generation import Generator, Sampling
from tests.parity import cases, causal_cases, pytorch, references, seq2seq_cases
from tests.parity.causal_cases import CausalInputs
from tests.parity.test_stored import TOLERANCE


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
        def step(cache, number):
            positions_B = jnp.clip(firsts_B + number - delays_B, firsts_B, lengths_B - 1)
            logits_BV, cache = model.step(params, tokens_BT[rows, positions_B], positions_B, cache)
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


def generate(loaded, **sampling):
    """The tokens that jax_it's generator gives for each source or prompt, all in one batch."""
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    given = loaded.given
    if isinstance(given, CausalInputs):
        sources, length = given.prompts, pytorch.NEW_TOKENS["causal"]
    else:
        sources = [row[:n].tolist() for row, n in zip(given.source_BS, seq2seq_cases.SOURCE_LENGTHS, strict=True)]
        length = pytorch.NEW_TOKENS["seq2seq"]
    generator = Generator(loaded.model, mesh, length, len(sources), Sampling(**sampling))
    found = dict(generator(loaded.params, sources))
    return [found[i] for i in range(len(sources))]


def until_end(loaded, texts_BT):
    """Stored texts without their end tokens and what follows."""
    drop = [*loaded.case.end_tokens, pytorch.NONE]
    return [[token for token in text if token not in drop] for text in texts_BT.tolist()]


def test_greedy_texts_are_those_of_transformers(loaded):
    reference = references.read(loaded.case)
    assert generate(loaded) == until_end(loaded, reference.texts["greedy"])


@pytest.mark.parametrize("beams", causal_cases.BEAMS)
@pytest.mark.parametrize(
    "case", [cases.BY_NAME[name] for name in causal_cases.BEAM_SEARCHED], indirect=True, ids=causal_cases.BEAM_SEARCHED
)
def test_texts_of_beam_search_are_those_of_transformers(loaded, beams):
    reference = references.read(loaded.case)
    assert generate(loaded, **causal_cases.BEAMS[beams]) == until_end(loaded, reference.texts[beams])
