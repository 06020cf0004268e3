"""Decoded texts are those of Transformers' `generate`, token for token, and so are the tokens that sampling leaves."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jax_it import config, models, pretrained, sharding
from jax_it.generation import Engine, Sampling, generate
from jax_it.generation.sampling import filter_logits
from tests.generation.conftest import by_prompt

pytestmark = pytest.mark.parity

FAMILIES = {
    "t5": {"model_type": "t5", "feed_forward_proj": "relu"},
    "t5-gated-untied": {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5": {"model_type": "mt5", "feed_forward_proj": "gated-gelu"},
    "umt5": {"model_type": "umt5", "feed_forward_proj": "gated-gelu"},
}
# Seeds whose texts vary, as each test checks.
SEEDS = {"t5": 1, "t5-gated-untied": 6, "mt5": 4, "umt5": 0}
SIZES = {
    "vocab_size": 60,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,  # of the decoder too: `generate` of Transformers 5 fails where it has more than the encoder
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
}
END, LENGTH, ROWS = 1, 12, 32


class Pair(NamedTuple):
    torch: Any  # Transformers' model
    model: models.Model
    params: models.Params
    mesh: jax.sharding.Mesh
    sources: list[list[int]]

    def theirs(self, **settings: Any) -> list[list[int]]:
        import torch

        source, mask = np.zeros((2, ROWS, max(map(len, self.sources))), np.int64)
        for row, tokens in enumerate(self.sources):
            source[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        texts = self.torch.generate(
            input_ids=torch.tensor(source),
            attention_mask=torch.tensor(mask),
            max_new_tokens=LENGTH,
            do_sample=False,
            **settings,
        )[:, 1:].tolist()
        return [text[: text.index(END)] if END in text else text for text in texts]

    def ours(self, **settings: Any) -> list[list[int]]:
        found = by_prompt(
            generate(Engine(self.model, self.mesh, LENGTH, ROWS, Sampling(**settings)), self.params, self.sources)
        )
        return [found[i] for i in range(ROWS)]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory) -> Pair:
    """A random model whose end mark is likely enough for texts of all lengths, in both."""
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(SEEDS[request.param])
    values = SIZES | FAMILIES[request.param]
    torch_model = transformers.AutoModelForSeq2SeqLM.from_config(transformers.AutoConfig.for_model(**values)).eval()
    rng = np.random.default_rng(0)
    sources = [[*rng.integers(2, SIZES["vocab_size"], length).tolist(), END] for length in rng.integers(0, 24, ROWS)]
    with torch.no_grad():
        for name, parameter in torch_model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            elif "EncDecAttention.o" in name or ("decoder" in name and "wo.weight" in name):
                parameter.mul_(15)  # so that the source and what came before count, and not the last token alone
        _make_likely(torch_model, sources)
    folder: Path = tmp_path_factory.mktemp(request.param)
    torch_model.save_pretrained(folder)
    mesh = sharding.make_mesh(config.Mesh(data=1), jax.devices()[:1])
    return Pair(torch_model, *pretrained.load(config.Model(path=str(folder)), mesh), mesh, sources)


def _make_likely(torch_model: Any, sources: list[list[int]]) -> None:
    """Scales the logits to a standard deviation of 1.2 and turns the end mark's weights towards the mean state."""
    import torch

    states: list[Any] = []
    hook = torch_model.lm_head.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
    tokens = torch.randint(2, SIZES["vocab_size"], (ROWS, LENGTH))
    logits = torch_model(input_ids=torch.randint(2, SIZES["vocab_size"], (ROWS, 12)), decoder_input_ids=tokens).logits
    hook.remove()
    scale = 1.2 / logits.std()
    torch_model.decoder.final_layer_norm.weight.mul_(scale)
    mean = scale * states[0].mean((0, 1))
    torch_model.lm_head.weight[END] += 2.0 * mean / mean.square().sum()


def test_greedy_texts_are_the_same(pair):
    theirs = pair.theirs(num_beams=1)
    assert pair.ours() == theirs
    _check_variety(theirs)


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("length_penalty", [0.6, 1.0, 2.0])
@pytest.mark.parametrize("num_beams", [2, 4, 5])
def test_texts_of_beam_search_are_the_same(pair, num_beams, length_penalty, early_stopping):
    settings = {"num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": early_stopping}
    theirs = pair.theirs(**settings)
    assert pair.ours(**settings) == theirs
    _check_variety(theirs)


def _check_variety(texts: list[list[int]]) -> None:
    """That the texts are such as show something."""
    assert len({tuple(text) for text in texts}) >= 10 and len(set(map(len, texts))) >= 4


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("top_k", [0, 1, 10, 50])
def test_top_k_and_top_p_leave_the_same_tokens(top_k, top_p):
    import torch
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(0).normal(0, 3, (500, 1000)).astype(np.float32)
    warpers = [TemperatureLogitsWarper(0.7), *([TopKLogitsWarper(top_k)] if top_k else []), TopPLogitsWarper(top_p)]
    theirs = torch.tensor(logits)
    for warper in warpers:
        theirs = warper(None, theirs)
    ours = np.asarray(filter_logits(jax.numpy.asarray(logits) / 0.7, top_k, top_p))
    assert (np.isfinite(ours) == np.isfinite(theirs.numpy())).all()
