"""How the next token is chosen from logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """The most likely token, or one drawn: from the `top_k` likeliest (0: all) that hold `top_p` of the probability.

    With `num_beams` above 1 the best text of that many kept side by side, as in generation/beam.py.
    """

    temperature: float = 0.0  # 0: the most likely token
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0  # of beams: above 0 favours longer texts
    early_stopping: bool = False  # of beams: a row is done once `num_beams` texts have ended


GREEDY = Sampling()


def is_end(tokens: jax.Array, ends: tuple[int, ...]) -> jax.Array:
    """Where a token is one that ends a text."""
    return jnp.isin(tokens, jnp.asarray(ends))


def choose(logits_BV: jax.Array, sampling: Sampling, rows_B: jax.Array, position: jax.Array) -> jax.Array:
    """The next token of each row. What is drawn for a row depends on the seed, its number and its position alone."""
    if not sampling.temperature:
        return jnp.argmax(logits_BV, axis=-1)
    logits_BV = restrict(logits_BV / sampling.temperature, sampling.top_k, sampling.top_p)

    def draw(row: jax.Array, logits_V: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(sampling.seed), row), position)
        return jax.random.categorical(key, logits_V)

    return jax.vmap(draw)(rows_B, logits_BV)


def restrict(logits_BV: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Logits with all but the `top_k` likeliest tokens, and those past `top_p` of the probability, at -inf.

    As in Transformers: the token that crosses `top_p` stays, and one always does. Summed from the least likely
    token, where float32 tells a small rest from a smaller one.
    """
    if top_k:
        smallest_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)
    if top_p < 1:
        order_BV = jnp.argsort(logits_BV, axis=-1)
        rest_BV = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1), axis=-1)
        dropped_BV = (rest_BV <= 1 - top_p).at[:, -1].set(False)
        rows = jnp.arange(logits_BV.shape[0])[:, None]
        logits_BV = logits_BV.at[rows, order_BV].add(jnp.where(dropped_BV, -jnp.inf, 0.0))
    return logits_BV
