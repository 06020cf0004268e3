"""Log-likelihoods of continuations against PyTorch Transformers' full forward pass over prompt and continuation."""

import jax
import numpy as np
import pytest

from jax_it import config, sharding
from jax_it.generation import likelihood
from jax_it.generation.likelihood import LikelihoodRequest, Likelihoods
from tests.parity import cases, texts
from tests.parity.test_stored import TOLERANCE

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("case", [pytest.param(cases.BY_NAME[name], id=name) for name in texts.CASES], indirect=True)
@pytest.mark.parametrize("step", [0, 10**6], ids=["decode", "forward"])
def test_log_likelihoods_are_those_of_transformers(loaded, torch_model, step, monkeypatch):
    import torch

    monkeypatch.setattr(likelihood, "STEP_COST", step)
    random = loaded.case.random
    vocabulary = loaded.model.config.vocab_size
    lengths = [(1, 3, 2), (2, 2), (1, 1, 1, 1)]
    requests = [
        LikelihoodRequest(list(prompt), [random.randint(3, vocabulary, length).tolist() for length in each])
        for prompt, each in zip(texts.prompts(loaded.case), lengths, strict=False)
    ]
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    found = dict(Likelihoods(loaded.model, mesh, 4)(loaded.params, requests))
    for i, request in enumerate(requests):
        for tokens, ours in zip(request.continuations, found[i], strict=True):
            with torch.no_grad():
                if loaded.model.kind == "causal":
                    given = {"input_ids": torch.tensor([[*request.prompt, *tokens[:-1]]])}
                else:
                    start = [loaded.model.config.decoder_start_token_id, *tokens[:-1]]
                    given = {"input_ids": torch.tensor([request.prompt]), "decoder_input_ids": torch.tensor([start])}
                logits = torch_model(**given).logits[0, -len(tokens) :].double()
            theirs = logits.log_softmax(-1)[np.arange(len(tokens)), tokens].sum().item()
            # A logit may differ by the tolerance, and so may the log of the softmax's denominator.
            assert ours.log_prob == pytest.approx(theirs, abs=2 * TOLERANCE * len(tokens))
            assert ours.greedy == (logits.argmax(-1).tolist() == tokens)
