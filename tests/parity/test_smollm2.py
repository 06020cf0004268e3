"""Real weights: texts of SmolLM2-135M are those of Transformers' `generate`.

    JAX_IT_SMOLLM2=FOLDER make parity PYTEST_ARGS="-k smollm2_135m"

where the folder holds the model in Transformers format (HuggingFaceTB/SmolLM2-135M or its Instruct). Ten minutes.
"""

import os
from typing import Any

import jax
import numpy as np
import pytest

from jax_it import config, models, pretrained, sharding
from jax_it.data import tokenizer_files as tokenizer
from jax_it.generation import Engine, Sampling, generate
from tests.parity import pytorch, texts

FOLDER = os.environ.get("JAX_IT_SMOLLM2", "")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not FOLDER, reason="JAX_IT_SMOLLM2 names no folder that holds SmolLM2-135M"),
]

PROMPTS = [
    "The capital of France is",
    "Question: A farmer has 17 sheep, and all but 9 run away. How many are left?\nAnswer:",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea, there lived an old woman who could talk to the wind. One morning",
    "Translate into German: Good morning",
    "1, 2, 4, 8, 16,",
]
LENGTH = 24
MORE_ENDS = ("\n", ".", ".\n")  # so that texts have many lengths
NOISE = 2e-4  # of logits that are up to 30, in float32
SETTINGS = {name: texts.SETTINGS[name] for name in ("plain", *texts.BEAMS, "repetition", "minimum", "all_beams")}


@pytest.fixture(scope="module")
def torch_model() -> Any:
    return pytorch.open_folder(FOLDER)


@pytest.fixture(scope="module")
def loaded() -> tuple[models.Model, models.Params]:
    return pretrained.load(config.Model(path=FOLDER), sharding.make_mesh(config.Mesh(), jax.devices()[:1]))


@pytest.fixture(scope="module")
def given() -> tuple[list[list[int]], list[int]]:
    """The prompts, and the tokens that end texts beside the model's own."""
    read = tokenizer.load(FOLDER)
    ends = [tokens[0] for tokens in read.encode(MORE_ENDS) if len(tokens) == 1]
    assert len(ends) >= 2
    return read.encode(PROMPTS), ends


@pytest.mark.parametrize("name", SETTINGS)
def test_texts_of_smollm2_135m_are_those_of_transformers(torch_model, loaded, given, name):
    model, params = loaded
    prompts, more_ends = given
    settings = SETTINGS[name]
    ends = [*model.config.eos_token_ids, *more_ends]
    theirs = pytorch.continued(torch_model, prompts, LENGTH, ends, **settings)
    for seed in (0, 1):
        noisy = pytorch.continued(torch_model, prompts, LENGTH, ends, noise=NOISE, seed=seed, **settings)
        np.testing.assert_array_equal(noisy, theirs, err_msg="a tie, or nearly: other prompts, please")
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    engine = Engine(model, mesh, LENGTH, len(prompts), Sampling(**settings), more_ends)
    ours = {text.request_id: text.tokens for text in generate(engine, params, prompts)}
    expected = [[token for token in text if token not in (*ends, pytorch.NONE)] for text in theirs.tolist()]
    assert [ours[i] for i in range(len(prompts))] == expected
