"""Greedy decoding of one prompt, as plainly as it can be written: what `slots.py` does for many prompts at a time.

Users do not run this: a greedy search is a `Sampler` with temperature 0, in the engine's slots.
"""

from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp

from jax_it.models import Model, Params


def greedy(
    model: Model, params: Params, prompt: Sequence[int], max_new_tokens: int, eos_ids: Collection[int] = ()
) -> list[int]:
    """Return the tokens that follow a prompt, the likeliest at each step, without the end token.

    The prompt is a causal model's tokens so far, or an encoder-decoder's source with its end token. The text ends at
    one of the model's end tokens, at one of `eos_ids`, or after `max_new_tokens`. Every call compiles two programs, so
    this is for reading and for tests.
    """
    prefill = jax.jit(model.prefill, static_argnums=3)
    decode_step = jax.jit(model.decode_step)
    weights = model.prepare_for_decoding(params)

    prompt_BS = jnp.asarray([prompt], jnp.int32)  # a batch of one
    token_B, position_B, cache = prefill(params, prompt_BS, jnp.ones_like(prompt_BS), max_new_tokens)
    tokens: list[int] = []
    while len(tokens) < max_new_tokens:
        logits_BV, cache = decode_step(weights, token_B, position_B, cache)
        token_B, position_B = logits_BV.argmax(-1).astype(jnp.int32), position_B + 1
        if int(token_B[0]) in (*model.config.eos_token_ids, *eos_ids):
            break
        tokens.append(int(token_B[0]))
    return tokens
