import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest

from jax_it import config as settings
from jax_it import models, sharding
from jax_it.data.packing import Layout
from jax_it.data.tokenizer import Tokenizer
from jax_it.run import open_run
from jax_it.run_dir import RunDir
from tests import tiny_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Not to be changed: `tiny_run.copy` makes a copy that may be."""
    return tiny_run.finished(tmp_path_factory)


class Opened(NamedTuple):
    """A run's parts on one device."""

    config: settings.Config
    layout: Layout
    model: models.Model
    params: Any
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh


@pytest.fixture(scope="session")
def opened(finished: Path) -> Opened:
    run = dataclasses.replace(open_run(RunDir(finished)), mesh=sharding.make_mesh(settings.Mesh(), jax.devices()[:1]))
    params = run.load_params(tiny_run.STEPS)
    return Opened(run.config, run.layout, run.model, params, run.tokenizer, run.mesh)
