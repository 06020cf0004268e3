"""A finished run for all tests, and libraries that do not report the faults."""

import gc
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jax_it.cli import silence_libraries
from tests import tiny_run


@pytest.fixture(scope="package", autouse=True)
def quiet_libraries() -> Iterator[None]:
    """What the command does for its process, undone at the end: here damage and full disks are on purpose."""
    hook = sys.unraisablehook
    levels = {name: logging.getLogger(name).level for name in ("absl", "asyncio")}
    silence_libraries()
    yield
    gc.collect()  # what fails only when it is thrown away
    sys.unraisablehook = hook
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Not to be changed: `tiny_run.copy` makes a copy that may be."""
    return tiny_run.finished(tmp_path_factory)


@pytest.fixture(scope="session")
def config(finished: Path) -> Path:
    """Its config file."""
    return finished.parent / "config.py"
