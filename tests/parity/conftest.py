"""Each case once: its folder, jax_it's model of it, Transformers' model of it, and what both compute."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from jax_it.data.formats import CausalBatch, Seq2SeqBatch
from jax_it.models import Model, Params
from tests.parity import cases, pytorch
from tests.parity.cases import Case, Inputs, Results


class Loaded(NamedTuple):
    """A case as jax_it reads it."""

    case: Case
    folder: Path
    given: Inputs
    batch: CausalBatch | Seq2SeqBatch
    model: Model
    params: Params


@pytest.fixture(scope="session", params=cases.params(cases.ALL))
def case(request: Any) -> Case:
    return request.param


@pytest.fixture(scope="session")
def folder(case: Case, tmp_path_factory: Any) -> Path:
    return cases.write(case, tmp_path_factory.mktemp(case.name))


@pytest.fixture(scope="session")
def loaded(case: Case, folder: Path) -> Loaded:
    given = cases.inputs(case)
    return Loaded(case, folder, given, cases.batch(case, given), *cases.load(folder, dropout=0.0))


@pytest.fixture(scope="session")
def ours(loaded: Loaded) -> Results:
    return cases.results(loaded.model, loaded.params, loaded.batch)


@pytest.fixture(scope="session")
def torch_model(folder: Path) -> Any:
    """Transformers' model of the same folder. Needs PyTorch: for tests marked parity alone."""
    return pytorch.open_folder(folder)


@pytest.fixture(scope="session")
def theirs(torch_model: Any, case: Case) -> Results:
    return pytorch.results(torch_model, cases.inputs(case))
