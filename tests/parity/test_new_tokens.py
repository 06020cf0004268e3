"""Tokens added to models, against `resize_token_embeddings` and PEFT's `trainable_token_indices`. `make parity`."""

from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jax_it import config, pretrained, sharding
from jax_it.models import Model, Params
from jax_it.models.weights import flatten, unflatten
from jax_it.pretrained import hf, peft
from tests.parity import cases, pytorch
from tests.parity.test_peft import load, randomised
from tests.parity.test_stored import TOLERANCE

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT's own use
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

# A head of its own and a tied one, of both kinds; an embedding for each half; a head with another name in files.
CASES = ("llama3", "llama3_tied", "t5_1_1", "t5", "t5gemma", "gpt_neox")
ROWS = 96  # of a case's embedding
NEW = (95, 96, 97)  # a row to spare is used first


def inputs(name: str) -> Any:
    """The case's inputs with new tokens among them."""
    given = cases.inputs(cases.BY_NAME[name])

    def replaced(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return np.where((mask > 0) & (tokens % 5 == 0), NEW[0] + np.arange(tokens.shape[1]) % 3, tokens)

    if hasattr(given, "tokens_BT"):
        return given._replace(tokens_BT=replaced(given.tokens_BT, given.mask_BT))
    return given._replace(
        source_BS=replaced(given.source_BS, given.source_mask_BS),
        target_BT=replaced(given.target_BT, given.target_mask_BT),
    )


def logits(model: Model, params: Params, name: str) -> np.ndarray:
    batch = cases.batch(cases.BY_NAME[name], inputs(name))
    compute = jax.jit(lambda params: model.logits(model.head(params), model.hidden_states(params, batch)[0]))
    return np.asarray(compute(params))[np.asarray(batch.segments_BT) > 0]


def torch_logits(model: Any, name: str) -> np.ndarray:
    batch = cases.batch(cases.BY_NAME[name], inputs(name))
    return pytorch.logits(model, inputs(name), cases.BY_NAME[name])[np.asarray(batch.segments_BT) > 0]


def with_new_tokens(folder: Path, rank: int) -> tuple[Model, Params]:
    """The model with new tokens; adapters, or else all weights, are shaken."""
    settings = config.Model(path=str(folder), dropout=0.0, lora=config.Lora(rank=rank))
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    model, params = pretrained.load(settings, mesh, new_ids=NEW)
    trained, frozen = model.split(params)
    random = np.random.default_rng(0)
    noise = {
        path: leaf + 0.05 * random.standard_normal(leaf.shape).astype(np.float32)
        for path, leaf in flatten(trained).items()
    }
    return model, model.join(unflatten(noise), frozen)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return cache(lambda name: cases.write(cases.BY_NAME[name], tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize("name", ["llama3", "t5"])
def test_rows_are_appended_as_transformers_resizes_embeddings(name, folders):
    import torch

    theirs = pytorch.open_folder(folders(name))
    torch.manual_seed(0)
    theirs.resize_token_embeddings(ROWS + 2)
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    _, params = pretrained.load(config.Model(path=str(folders(name))), mesh, new_ids=(ROWS, ROWS + 1))
    modules = {"embedding": theirs.get_input_embeddings(), "head": theirs.get_output_embeddings()}
    for path in modules.keys() & params.keys():
        rows, ours = modules[path].weight.detach().numpy(), np.asarray(params[path])
        np.testing.assert_array_equal(ours[:ROWS], rows[:ROWS])
        # They are drawn from around the mean, with 1e-9 of the covariance: 5 standard deviations.
        np.testing.assert_allclose(ours[ROWS:], rows[ROWS:], rtol=0, atol=5 * 1e-9**0.5 * rows[:ROWS].std(0).max())


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("name", CASES)
def test_an_exported_model_gives_the_same_logits_in_transformers(name, rank, folders, tmp_path):
    model, params = with_new_tokens(folders(name), rank)
    ours = logits(model, params, name)
    merged, params = model.merge(params)
    hf.save(tmp_path, merged, params)
    exported = pytorch.open_folder(tmp_path)
    assert exported.get_input_embeddings().weight.shape[0] == ROWS + 2
    np.testing.assert_allclose(ours, torch_logits(exported, name), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_rows_trained_here_give_the_same_logits_in_peft(name, folders, tmp_path):
    from peft import PeftModel

    model, params = with_new_tokens(folders(name), rank=2)
    ours = logits(model, params, name)
    peft.save(tmp_path, model, params, str(folders(name)))
    base = pytorch.open_folder(folders(name))
    resize(base)
    adapted = PeftModel.from_pretrained(base, tmp_path).eval()
    np.testing.assert_allclose(ours, torch_logits(adapted, name), rtol=0, atol=TOLERANCE)
    again = logits(*load(folders(name), tmp_path), name)
    np.testing.assert_allclose(again, ours, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "name, indices",
    [
        ("llama3", list(NEW)),  # of the embedding alone
        ("llama3", {"embed_tokens": list(NEW), "lm_head": list(NEW)}),
        ("llama3_tied", list(NEW)),
        ("t5", list(NEW)),
        ("t5_1_1", list(NEW)),
    ],
)
def test_rows_trained_by_peft_give_the_same_logits_here(name, indices, folders, tmp_path):
    """Its folder has the resized embeddings as well."""
    import torch
    from peft import LoraConfig, get_peft_model

    base = pytorch.open_folder(folders(name))
    torch.manual_seed(0)
    resize(base)
    task = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    settings = LoraConfig(target_modules="all-linear", task_type=task, r=2, trainable_token_indices=indices)
    made = randomised(get_peft_model(base, settings)).eval()
    with torch.no_grad():
        for parameter_name, weight in made.named_parameters():
            if "trainable_tokens_delta" in parameter_name:
                weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    made.save_pretrained(tmp_path)
    model, params = load(folders(name), tmp_path)
    if name == "llama3" and isinstance(indices, list):  # PEFT leaves the new rows of the head as they were drawn
        head = np.array(params["head"])
        head[ROWS:] = made.get_output_embeddings().weight.detach().numpy()[ROWS:]
        params["head"] = jax.numpy.asarray(head)
    np.testing.assert_allclose(logits(model, params, name), torch_logits(made, name), rtol=0, atol=TOLERANCE)


def resize(model: Any) -> None:
    """As users do; but Transformers' method ties the head of a T5 that has one, and forgets T5Gemma's decoder."""
    import torch

    if not model.config.is_encoder_decoder:
        model.resize_token_embeddings(max(NEW) + 1)
        return
    modules = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    for module in [*modules, model.get_output_embeddings()]:
        if module.weight.shape[0] == ROWS:  # tied weights are one, and not a table of relative positions
            module.weight.data = torch.cat(
                [module.weight.data, torch.zeros(max(NEW) + 1 - ROWS, module.weight.shape[1])]
            )
