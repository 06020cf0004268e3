"""The recipes of all these tests."""

from pathlib import Path

import pytest

from tests.multihost import processes


@pytest.fixture(scope="session")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A config file for each kind of model."""
    return processes.write_recipes(tmp_path_factory.mktemp("recipes"))
