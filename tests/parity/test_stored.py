"""jax_it against stored results of PyTorch, which need none. How to renew them: `references.py`."""

import numpy as np
import pytest

from tests.parity import cases, references

# Rounding in float32 is 6e-8 of a value. Some 30 sums in a row, of 32 to 288 terms of order 1 each, leave 1e-6 to
# 4e-6 between two orders of summation, in logits as in gradients beside their largest entry; this is five times that.
TOLERANCE = 2e-5


@pytest.mark.parametrize("case", cases.ALL, ids=lambda case: case.name)
def test_stored_results_are_those_of_the_case(case):
    found = references.read(case)
    assert found.digest == cases.digest(case), f"the case {case.name} has changed since its results; {references.RENEW}"


def test_every_stored_file_has_its_case():
    names = {file.name for file in references.FOLDER.iterdir()}
    assert names == {f"{case.name}.npz" for case in cases.ALL}


def test_stored_files_are_small():
    sizes = [file.stat().st_size for file in references.FOLDER.iterdir()]
    assert max(sizes) < 60_000 and sum(sizes) < 800_000


def test_logits_and_loss_are_those_of_pytorch(loaded, ours):
    reference = references.read(loaded.case)
    logits_XV = references.stored_part(loaded.given, ours.logits_BTV)
    np.testing.assert_allclose(logits_XV, reference.logits_XV, rtol=0, atol=TOLERANCE)
    assert ours.loss == pytest.approx(reference.loss, rel=TOLERANCE)


def test_the_gradient_of_every_weight_is_that_of_pytorch(loaded, ours):
    check_gradients(ours.gradients, references.read(loaded.case).gradients)


def check_gradients(ours, sketches):
    assert ours.keys() == sketches.keys()
    for name, theirs in sketches.items():
        sketch = references.sketch(name, ours[name])
        # An error of a share of the norm moves a sum under random signs by about that share of the norm, seldom thrice.
        np.testing.assert_allclose(sketch, theirs, rtol=0, atol=3 * TOLERANCE * theirs[0], err_msg=name)
