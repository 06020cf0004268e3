from pathlib import Path

import pytest

from tests import tiny_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Not to be changed: `tiny_run.copy` makes a copy that may be."""
    return tiny_run.finished(tmp_path_factory)
