"""Tiny models with the weights of tests/parity/cases.py: one of each kind of relative-position bias."""

from pathlib import Path
from typing import Any

import pytest

from jax_it.models import Model, Params
from tests.parity import cases


@pytest.fixture(scope="session")
def folder(tmp_path_factory: Any) -> Path:
    """A T5 1.1 in Transformers' format. Not to be changed: `cases.write` makes a copy that may be."""
    return cases.write(cases.BY_NAME["t5_1_1"], tmp_path_factory.mktemp("t5_1_1"))


@pytest.fixture(scope="session")
def t5_1_1(folder: Path) -> tuple[Model, Params]:
    return cases.load(folder)


@pytest.fixture(scope="session")
def umt5(tmp_path_factory: Any) -> tuple[Model, Params]:
    return cases.load(cases.write(cases.BY_NAME["umt5"], tmp_path_factory.mktemp("umt5")))
