"""Each case once: its folder, jax_it's model of it, Transformers' model of it, and what both compute."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from jax_it.models import Model, Params
from tests.parity import cases, pytorch
from tests.parity.cases import Case, Inputs, Results


class Loaded(NamedTuple):
    """A case as jax_it reads it."""

    case: Case
    folder: Path
    given: Inputs
    model: Model
    params: Params


# Of the same computation as another case, but for a line or two: compiled by make parity and make test-slow alone.
VARIANTS = {"t5_1_1_tied", "byt5", "deep_decoder", "mt5_tied", "umt5_tied"}
PARAMS = [
    pytest.param(case, id=case.name, marks=pytest.mark.slow if case.name in VARIANTS else ()) for case in cases.CASES
]


@pytest.fixture(scope="session", params=PARAMS)
def loaded(request: Any, tmp_path_factory: Any) -> Loaded:
    case = request.param
    folder = cases.write(case, tmp_path_factory.mktemp(case.name))
    return Loaded(case, folder, cases.inputs(case), *cases.load(folder))


@pytest.fixture(scope="session")
def ours(loaded: Loaded) -> Results:
    return cases.results(loaded.model, loaded.params, loaded.given)


@pytest.fixture(scope="session")
def torch_model(loaded: Loaded) -> Any:
    """Transformers' model of the same folder. Needs PyTorch: for tests marked parity alone."""
    return pytorch.open_folder(loaded.folder)


@pytest.fixture(scope="session")
def theirs(torch_model: Any, loaded: Loaded) -> Results:
    return pytorch.results(torch_model, loaded.given)
