"""A tiny T5 and a tiny Llama of random weights whose texts depend on their prompt and end at various lengths."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
import pytest

from jax_it import config, models, sharding
from jax_it.generation import RequestOutput


@pytest.fixture(scope="package", autouse=True)
def quick_compilation() -> Iterator[None]:
    """These tests compile much and compute little."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


class Tiny(NamedTuple):
    model: models.Model
    params: models.Params
    sources: list[list[int]]  # prompts
    mesh: jax.sharding.Mesh  # of one device


def by_prompt(texts: Iterable[RequestOutput]) -> dict[int, list[int]]:
    """The tokens of each prompt's text."""
    return {text.request_id: text.tokens for text in texts}


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    values = {
        "model_type": "t5",
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "vocab_size": 40,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
    }
    model = models.build(values, "the test", config.Model(dropout=0.0))
    params = jax.jit(model.init)(jax.random.key(1))
    for name in ("attention", "cross", "mlp"):  # so that what was read outweighs the last token
        layer = params["decoder"]["layers"][name]
        out = "down" if name == "mlp" else "output"
        layer[out] = layer[out] * (6 if name == "cross" else 3)
    params["head"] = params["head"].at[1].multiply(2.2)  # the end mark comes more often
    rng = np.random.default_rng(0)
    sources = [[*rng.integers(2, 40, length).tolist(), 1] for length in (3, 12, 1, 30, 7, 20, 5, 29, 0, 9, 15, 31)]
    mesh = sharding.make_mesh(config.Mesh(data=1), jax.devices()[:1])
    return Tiny(model, params, sources, mesh)


@pytest.fixture(scope="session")
def llama() -> Tiny:
    """Causal, with two heads of queries to each of keys."""
    values = {
        "model_type": "llama",
        "vocab_size": 40,
        "hidden_size": 32,
        "head_dim": 8,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "eos_token_id": 1,
    }
    model = models.build(values, "the test", config.Model())
    params = jax.jit(model.init)(jax.random.key(1))
    layers = params["layers"]
    layers["attention"]["output"] *= 4  # so that what was read outweighs the last token
    layers["mlp"]["down"] *= 2
    params["head"] = params["head"].at[1].multiply(2.2)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 40, length).tolist() for length in (3, 12, 1, 30, 7, 20, 5, 29, 2, 9, 15, 32)]
    return Tiny(model, params, prompts, sharding.make_mesh(config.Mesh(data=1), jax.devices()[:1]))
