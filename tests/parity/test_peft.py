"""Adapters against PEFT itself: those that it makes read here, and those made here read there. `make parity`."""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jax_it import config, pretrained, sharding
from jax_it.models import Model, Params
from jax_it.models.weights import flatten, unflatten
from jax_it.pretrained import peft
from tests.parity import cases, pytorch
from tests.parity.test_stored import TOLERANCE

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT's own use
]

# Matrices stored either way round, shared tensors whole and interleaved, experts beside attention, encoder-decoders.
CASES = ("llama3", "phi3", "gpt2", "gpt_neox", "gemma2", "mixtral", "t5_1_1", "t5gemma")
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "dora": {"r": 2, "lora_alpha": 3, "use_dora": True},
}
TARGETS = {"phi3": ["qkv_proj", "down_proj"], "gpt2": ["c_attn"], "mixtral": ["q_proj", "o_proj"]}


def logits(model: Model, params: Params, name: str) -> np.ndarray:
    case = cases.BY_NAME[name]
    batch = cases.batch(case, cases.inputs(case))
    compute = jax.jit(lambda params: model.logits(model.head(params), model.hidden_states(params, batch)[0]))
    return np.asarray(compute(params))


def at_targets(name: str, found: np.ndarray) -> np.ndarray:
    from tests.parity import references

    return references.at_targets(cases.inputs(cases.BY_NAME[name]), found)


def randomised(model: Any) -> Any:
    """PEFT's model with adapters that do something: it begins with zeros."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, weight in model.named_parameters():
            if "lora_B" in parameter_name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
            if "magnitude" in parameter_name:
                weight.mul_(1 + 0.2 * torch.rand(weight.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return cache(lambda name: cases.write(cases.BY_NAME[name], tmp_path_factory.mktemp(name)))


def load(folder: Path, adapter: Path) -> tuple[Model, Params]:
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    settings = config.Model(path=str(folder), dropout=0.0, lora=config.Lora(path=str(adapter)))
    return pretrained.load(settings, mesh)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_an_adapter_made_by_peft_gives_the_same_logits_here(name, kind, folders, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = pytorch.open_folder(folders(name))
    task = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    settings = LoraConfig(
        target_modules=TARGETS.get(name, "all-linear"), task_type=task, fan_in_fan_out=name == "gpt2", **KINDS[kind]
    )
    made = randomised(get_peft_model(base, settings)).eval()
    made.save_pretrained(tmp_path)
    given = cases.inputs(cases.BY_NAME[name])
    theirs = pytorch.logits(made, given, cases.BY_NAME[name])
    model, params = load(folders(name), tmp_path)
    ours = at_targets(name, logits(model, params, name))
    np.testing.assert_allclose(ours, at_targets(name, theirs), rtol=0, atol=TOLERANCE)
    plain = at_targets(name, logits(*cases.load(folders(name), dropout=0.0), name))
    assert np.abs(ours - plain).max() > 1000 * TOLERANCE, "the adapter does nothing: the comparison would say nothing"
    merged = at_targets(name, logits(*model.merge(params), name))
    np.testing.assert_allclose(merged, ours, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_an_adapter_made_here_gives_the_same_logits_in_peft(name, kind, folders, tmp_path):
    from peft import PeftModel

    values = KINDS[kind]
    lora = config.Lora(
        rank=values["r"],
        alpha=values["lora_alpha"],
        rank_stabilized=values.get("use_rslora", False),
        dora=values.get("use_dora", False),
    )
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    model, params = pretrained.load(config.Model(path=str(folders(name)), dropout=0.0, lora=lora), mesh)
    trained, frozen = model.split(params)
    random = np.random.default_rng(0)
    leaves = flatten(trained)
    for path, leaf in leaves.items():
        noise = random.standard_normal(leaf.shape).astype(np.float32)
        leaves[path] = leaf * (1 + 0.1 * noise) if path.endswith("magnitude") else leaf + 0.05 * noise
    params = model.join(unflatten(leaves), frozen)
    peft.save(tmp_path, model, params, str(folders(name)))
    base = pytorch.open_folder(folders(name))
    adapted = PeftModel.from_pretrained(base, tmp_path).eval()
    given = cases.inputs(cases.BY_NAME[name])
    theirs = at_targets(name, pytorch.logits(adapted, given, cases.BY_NAME[name]))
    ours = at_targets(name, logits(model, params, name))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
    again = at_targets(name, logits(*load(folders(name), tmp_path), name))
    np.testing.assert_allclose(again, ours, rtol=0, atol=TOLERANCE)


def test_an_adapter_with_ranks_of_its_own_for_some_modules_is_read(folders, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = pytorch.open_folder(folders("llama3"))
    settings = LoraConfig(
        target_modules=["q_proj", "up_proj"],
        r=4,
        lora_alpha=8,
        rank_pattern={"up_proj": 3},
        alpha_pattern={"q_proj": 2},
    )
    made = randomised(get_peft_model(base, settings)).eval()
    made.save_pretrained(tmp_path)
    given = cases.inputs(cases.BY_NAME["llama3"])
    theirs = at_targets("llama3", pytorch.logits(made, given, cases.BY_NAME["llama3"]))
    model, params = load(folders("llama3"), tmp_path)
    assert {target.rank for target in model.adapter.targets} == {3, 4}
    np.testing.assert_allclose(at_targets("llama3", logits(model, params, "llama3")), theirs, rtol=0, atol=TOLERANCE)
    assert dataclasses.replace(model, adapter=None).shapes == model.shapes
