"""Compiled programs are kept where that is safe."""

import subprocess
import sys

import pytest

from jax_it import compilation_cache
from tests import xla

PROGRAM = """
import jax, sys
from jax_it import compilation_cache
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
compilation_cache.enable(sys.argv[1])
print(compilation_cache.folder())
jax.jit(lambda x: x + 1)(1.0).block_until_ready()
"""


@pytest.mark.parametrize("devices, kept", [(1, True), (2, False)])
def test_programs_are_kept_in_the_cache_directory_unless_there_are_several_cpu_devices(devices, kept, tmp_path):
    environment = {"XLA_FLAGS": xla.flags(devices=devices), "JAX_PLATFORMS": "cpu", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    folder = done.stdout.strip()
    assert folder.startswith(str(tmp_path / "compiled")) if kept else not folder
    assert any(tmp_path.rglob("jit_*")) == kept


def test_a_folder_that_jax_was_told_stays(tmp_path, monkeypatch):
    monkeypatch.setattr("jax_it.compilation_cache.jax.config", type("C", (), {"jax_compilation_cache_dir": "mine"}))
    compilation_cache.enable(str(tmp_path))
    assert compilation_cache.folder() == "mine" and not list(tmp_path.iterdir())
