"""What can be said of the scripts and the container file without running a cloud."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.tpu.stubs import Cloud

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*(ROOT / "tpu").glob("*.sh"), ROOT / "tpu/slurm.sbatch"])
COMMANDS = [path for path in SCRIPTS if path.name in ("vm.sh", "gke.sh", "slurm.sbatch")]


def test_shellcheck_finds_nothing_in_the_scripts() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [shellcheck, "--external-sources", *SCRIPTS],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.name)
def test_help_names_every_option_that_the_script_reads(cloud: Cloud, script: Path) -> None:
    cloud.settings = {}
    done = cloud.run(f"tpu/{script.name}", "--help")
    assert done.returncode == 0, done.stderr
    read = set(re.findall(r"(--[a-z][a-z-]+)\)", script.read_text())) - {"--help"}
    assert len(read) > 5
    assert read <= set(re.findall(r"--[a-z][a-z-]+", done.stdout))
    assert max(map(len, done.stdout.splitlines())) <= 120
    assert cloud.calls() == []


def test_the_container_is_built_from_files_that_its_context_has() -> None:
    lines = (ROOT / "tpu/Dockerfile").read_text().splitlines()
    allowed = {line[1:] for line in (ROOT / "tpu/Dockerfile.dockerignore").read_text().split() if line[0] == "!"}
    copied = {word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]}
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)
    (python,) = re.findall(r"^ARG PYTHON=3\.(\d+)$", "\n".join(lines), re.MULTILINE)
    assert (ROOT / f"constraints/py3{python}.txt").is_file()


def test_the_extras_that_the_scripts_install_are_the_projects() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"tpu", "gcs", "cuda", "cuda12"} <= set(extras)
