"""What is drawn from, and what is reported of it, beside Transformers' own processors and scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_it import config, sharding
from jax_it.generation import Engine, Sampling, generate
from jax_it.generation.requests import TextSettings, slot_settings
from jax_it.generation.sampling import filter_logits, process_logits
from tests.parity import cases, texts
from tests.parity.test_stored import TOLERANCE

pytestmark = pytest.mark.parity

ROWS, VOCABULARY = 200, 1000
FILTERS = [
    Sampling(temperature=0.7),
    Sampling(temperature=1.5, top_k=1),
    Sampling(temperature=1.0, top_k=50),
    Sampling(temperature=0.8, top_p=0.9),
    Sampling(temperature=1.3, top_p=0.05),
    Sampling(temperature=1.0, min_p=0.1),
    Sampling(temperature=2.0, min_p=0.5),
    Sampling(temperature=0.9, top_k=40, top_p=0.95, min_p=0.02),
    Sampling(temperature=1.2, top_k=2000, top_p=0.5, min_p=1.0),
    Sampling(temperature=0.7, top_k=30, repetition_penalty=1.3, min_new_tokens=4),
    Sampling(temperature=1.1, top_p=0.8, repetition_penalty=0.7),
    Sampling(temperature=1.0, forced_bos_token=7, min_new_tokens=2),
]
ENDS = (1, 3)


@pytest.mark.parametrize("number", [0, 1, 4])
@pytest.mark.parametrize("sampling", FILTERS, ids=range(len(FILTERS)))
def test_the_probabilities_that_tokens_are_drawn_with_are_those_of_transformers(sampling, number):
    """Of the same logits, for texts of `number` new tokens: the softmax of what `generate`'s processors leave."""
    import torch
    import transformers

    rng = np.random.default_rng(0)
    logits_BV = rng.normal(0, 3, (ROWS, VOCABULARY)).astype(np.float32)
    texts_BT = rng.integers(0, VOCABULARY, (ROWS, 1 + number))  # the decoder's start token, and the new ones
    processors = transformers.LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.min_new_tokens:
        processors.append(
            transformers.MinNewTokensLengthLogitsProcessor(1, sampling.min_new_tokens, torch.tensor(ENDS))
        )
    if sampling.forced_bos_token is not None:
        processors.append(transformers.ForcedBOSTokenLogitsProcessor(sampling.forced_bos_token))
    processors.append(transformers.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(transformers.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(transformers.MinPLogitsWarper(sampling.min_p))
    theirs = processors(torch.tensor(texts_BT), torch.tensor(logits_BV)).softmax(-1).numpy()

    seen_BV = np.zeros(logits_BV.shape, bool)
    np.put_along_axis(seen_BV, texts_BT, True, axis=1)
    settings = slot_settings([TextSettings(sampling, 0, 1, False)] * ROWS, ROWS)
    allowed_BV = process_logits(
        jnp.asarray(logits_BV), settings, ENDS, jnp.full(ROWS, number), jnp.asarray(seen_BV, jnp.uint16),
        np.ones(ROWS, bool),
    )  # fmt: skip
    left_BV = filter_logits(allowed_BV / sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    ours = np.asarray(jax.nn.softmax(left_BV, axis=-1))
    np.testing.assert_array_equal(ours > 0, theirs > 0)
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(
    "case", [cases.BY_NAME[name] for name in ("t5_1_1", "llama3")], indirect=True, ids=lambda case: case.name
)
def test_log_probabilities_are_those_of_transformers(loaded, torch_model):
    """Those of greedy texts, the end mark's among them, beside `compute_transition_scores`, of one prompt at a time."""
    import torch

    prompts, ends = texts.prompts(loaded.case), texts.ends(loaded.case)
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    engine = Engine(loaded.model, mesh, texts.LENGTH, 4, eos_ids=ends)
    found = {text.request_id: text for text in generate(engine, loaded.params, prompts, logprobs=0)}
    for i, prompt in enumerate(prompts):
        made = torch_model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=texts.LENGTH,
            eos_token_id=ends,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        scores = torch_model.compute_transition_scores(made.sequences, made.scores, normalize_logits=True)[0].numpy()
        tokens = made.sequences[0, -len(scores) :].tolist()
        assert found[i].tokens == [token for token in tokens if token not in ends]
        np.testing.assert_allclose(found[i].log_probs, scores, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", [cases.BY_NAME["t5_1_1"]], indirect=True, ids=lambda case: case.name)
def test_several_texts_of_a_beam_search_are_those_of_transformers(loaded, torch_model):
    """The best few, best first, as `num_return_sequences` gives them."""
    import torch

    prompts, ends = texts.prompts(loaded.case), texts.ends(loaded.case)
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    sampling = Sampling(num_beams=4, num_samples=3)
    engine = Engine(loaded.model, mesh, texts.LENGTH, len(prompts), sampling, ends)
    found = {(text.request_id, text.sample): text.tokens for text in generate(engine, loaded.params, prompts)}
    for i, prompt in enumerate(prompts):
        made = torch_model.generate(
            input_ids=torch.tensor([prompt]),
            do_sample=False,
            num_beams=4,
            num_return_sequences=3,
            max_new_tokens=texts.LENGTH,
            eos_token_id=ends,
            pad_token_id=0,
        )[:, 1:].tolist()
        for sample, text in enumerate(made):
            end = next((at for at, token in enumerate(text) if token in ends), len(text))
            assert found[i, sample] == text[:end]
