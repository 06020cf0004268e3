"""Texts that outgrow LongRoPE's original length while they are generated, against Transformers' `generate`."""

import dataclasses

import jax
import pytest

from jax_it import config, sharding
from jax_it.generation import Engine, Sampling, generate
from tests.generation.conftest import by_prompt
from tests.parity import cases, pytorch

pytestmark = pytest.mark.parity

ORIGINAL = 14  # prompts have 23, 12 and 4 tokens, and go on for 16
FACTORS = {"long_factor": [4.0, 8.0, 1.0, 16.0], "short_factor": [1.0, 1.1, 1.25, 1.5], "rope_type": "longrope"}


# Phi-3's texts are computed again with the long factors; those of other families go on with what is in the cache.
@pytest.mark.parametrize("name, beams", [("phi3", 1), ("phi3", 3), ("llama3", 1)])
def test_texts_that_outgrow_the_original_length_are_those_of_generate(name, beams, tmp_path):
    case = cases.BY_NAME[name]
    values = {**case.values, "rope_scaling": FACTORS, "original_max_position_embeddings": ORIGINAL}
    values |= {"sliding_window": None, "bos_token_id": 1, "pad_token_id": 0}
    if name == "llama3":
        values["rope_scaling"] = FACTORS | {"original_max_position_embeddings": ORIGINAL}
        del values["sliding_window"]
    changed = dataclasses.replace(case, values=values)
    folder = cases.write(changed, tmp_path)
    given = cases.inputs(case)
    theirs = pytorch.generate(pytorch.open_folder(folder), given, num_beams=beams)
    ends = case.end_tokens
    expected = [[token for token in text if token not in (*ends, pytorch.NONE)] for text in theirs.tolist()]
    model, params = cases.load(folder, dropout=0.0)
    engine = Engine(model, sharding.make_mesh(config.Mesh(), jax.devices()[:1]), 16, 3, Sampling(num_beams=beams), ends)
    found = by_prompt(generate(engine, params, given.prompts))
    assert [found[i] for i in range(3)] == expected
    assert any(
        len(prompt) <= ORIGINAL < len(prompt) + len(text) for prompt, text in zip(given.prompts, expected, strict=True)
    )
