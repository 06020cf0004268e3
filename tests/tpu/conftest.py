"""A cloud of stubs for each test."""

from pathlib import Path

import pytest

from tests.tpu.stubs import Cloud, make_cloud


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return make_cloud(tmp_path)
