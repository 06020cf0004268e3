"""jax_it against PyTorch itself: `make parity`."""

import os

import numpy as np
import pytest

from jax_it.pretrained import safetensors as tensor_files
from tests.parity import cases, causal_cases, pytorch, references, texts
from tests.parity.test_round_trip import export, tensors
from tests.parity.test_stored import TOLERANCE

pytestmark = pytest.mark.parity


def test_logits_and_loss_are_those_of_pytorch(loaded, ours, theirs):
    pair = (references.at_targets(loaded.given, result.logits_BTV) for result in (ours, theirs))
    np.testing.assert_allclose(*pair, rtol=0, atol=TOLERANCE)
    assert ours.loss == pytest.approx(theirs.loss, rel=TOLERANCE)


def test_the_gradient_of_every_weight_is_that_of_pytorch(ours, theirs):
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in theirs.gradients.items():
        assert np.abs(gradient).max() > 1e-3, f"{name} has hardly a gradient: the comparison would say nothing"
        assert cases.relative_error(ours.gradients[name], gradient) < TOLERANCE, name


def test_the_model_is_the_same_whether_published_or_saved_by_transformers(loaded, torch_model, tmp_path):
    torch_model.save_pretrained(tmp_path)
    model, params = cases.load(tmp_path)
    assert model.config == loaded.model.config
    ours, saved = cases.by_name(loaded.model, loaded.params), cases.by_name(model, params)
    assert ours.keys() == saved.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, saved[name], err_msg=name)


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_transformers_saved_comes_back_byte_for_byte(case, dtype, shard, tmp_path):
    published = cases.write(case, tmp_path / "published", dtype)
    theirs = tmp_path / "theirs"
    pytorch.open_folder(published, dtype).save_pretrained(theirs, max_shard_size=shard)
    assert (theirs / tensor_files.INDEX).is_file() == (shard == "20KB")
    ours = export(theirs, tmp_path / "ours")
    assert tensors(ours) == tensors(theirs)
    assert tensors(theirs).keys() == {cases.plain(name) for name in set(cases.tensor_shapes(case)) - set(case.dead)}
    weights, reopened = (pytorch.open_folder(folder, dtype).state_dict() for folder in (theirs, ours))
    assert weights.keys() == reopened.keys()
    assert all(weights[name].equal(reopened[name]) for name in weights)


@pytest.mark.parametrize("shard_bytes", [tensor_files.SHARD_BYTES, 40_000])
def test_an_exported_folder_opens_in_transformers_as_the_same_model(
    loaded, torch_model, shard_bytes, tmp_path, monkeypatch
):
    monkeypatch.setattr(tensor_files, "SHARD_BYTES", shard_bytes)
    folder = export(loaded.folder, tmp_path / "exported")
    assert (folder / tensor_files.INDEX).is_file() == (shard_bytes == 40_000)
    reopened = pytorch.open_folder(folder)
    assert type(reopened) is type(torch_model)
    ours, theirs = (pytorch.logits(model, loaded.given, loaded.case) for model in (reopened, torch_model))
    np.testing.assert_array_equal(ours, theirs)


def test_stored_results_are_what_pytorch_gives(case, torch_model, theirs):
    given = cases.inputs(case)
    made = {"greedy": pytorch.generate(torch_model, given)}
    lead = pytorch.smallest_lead(torch_model, given, made["greedy"])
    assert lead > 20 * TOLERANCE, "a tie, or nearly: another seed of the inputs, please"
    if case.name in texts.CASES:
        for name, settings in texts.SETTINGS.items():
            made[name] = pytorch.texts(torch_model, case, **settings)
            for seed in (0, 1):
                noisy = pytorch.texts(torch_model, case, noise=10 * TOLERANCE, seed=seed, **settings)
                assert (noisy == made[name]).all(), f"{name}: a tie, or nearly: another seed of the prompts, please"
    balance = pytorch.balance(torch_model, given) if causal_cases.is_mixture(case) else None
    now = references.make(case, theirs, made, balance)
    if os.environ.get("RENEW_PARITY") or not references.path(case).is_file():
        references.write(case, now)
    stored = references.read(case)
    assert stored.digest == now.digest, f"the case {case.name} has changed since its results; {references.RENEW}"
    assert stored.texts.keys() == now.texts.keys()
    for name, text_BT in now.texts.items():
        np.testing.assert_array_equal(stored.texts[name], text_BT, err_msg=name)
    np.testing.assert_allclose(stored.logits_XV, now.logits_XV, rtol=0, atol=TOLERANCE)
    assert stored.loss == pytest.approx(now.loss, rel=TOLERANCE)
    assert stored.balance == (None if balance is None else pytest.approx(balance[0], rel=TOLERANCE))
    for before, after in ((stored.gradients, now.gradients), (stored.balance_gradients, now.balance_gradients)):
        assert before.keys() == after.keys()
        for name, sketch in after.items():
            np.testing.assert_allclose(before[name], sketch, rtol=0, atol=3 * TOLERANCE * sketch[0], err_msg=name)


def test_packed_examples_have_the_logits_and_the_loss_that_they_have_alone(loaded, ours):
    row = cases.packed(loaded.case, loaded.given)
    together = cases.results(loaded.model, loaded.params, row)
    np.testing.assert_allclose(
        together.logits_BTV[row.segments_BT > 0], ours.logits_BTV[loaded.given.mask_BT > 0], rtol=0, atol=TOLERANCE
    )
    assert together.loss == pytest.approx(ours.loss, rel=TOLERANCE)
    for name, gradient in ours.gradients.items():
        assert cases.relative_error(together.gradients[name], gradient) < TOLERANCE, name
