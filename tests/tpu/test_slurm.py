"""tpu/slurm.sbatch against stubs of sbatch, srun and scontrol that run the tasks on this machine."""

from typing import Any

import pytest

from tests.tpu.stubs import Cloud

RUN = ("tpu/slurm.sbatch", "--config=c.py", "--workdir=runs/a", "--jax-it=jax-it")


def plays(cloud: Cloud, *runs: list[Any], time_is_up: bool = False) -> None:
    tasks = len(runs[0]) if runs else 1
    cloud.settings = {
        "runs": runs,
        "tasks": tasks,
        "everyone": [str(task) for task in range(tasks)],
        "time_is_up": time_is_up,
    }


def steps(cloud: Cloud) -> list[str]:
    return [words[0] for words in cloud.calls()]


def test_a_job_starts_jax_it_on_every_task_and_ends_with_its_code(cloud: Cloud) -> None:
    plays(cloud, [0, 0])
    done = cloud.run("sbatch", "--nodes=2", *RUN, "--", "--config.x=a 'b' $c")
    assert done.returncode == 0, done.stderr
    assert steps(cloud) == ["sbatch", "srun"]
    for task in ("0", "1"):
        words, environment, folder = cloud.started(task)
        workdir = f"{cloud.checkout}/runs/a"
        assert words == ["train", "--config", "c.py", "--workdir", workdir, "--config.x=a 'b' $c"]
        assert environment["JAX_COMPILATION_CACHE_DIR"] == f"{cloud.checkout}/runs/jax_cache"
        assert folder == str(cloud.checkout)
    assert not list(cloud.checkout.glob(".slurm-codes-*"))


def test_a_job_whose_time_is_up_saves_and_goes_back_to_the_queue(cloud: Cloud) -> None:
    plays(cloud, ["hang", "hang"], [0, 0], time_is_up=True)
    done = cloud.run("sbatch", *RUN)
    assert done.returncode == 0, done.stderr
    assert "exit codes of the tasks: 75 75" in done.stderr
    assert sorted(path.name for path in cloud.folder.glob("saved-*")) == ["saved-0", "saved-1"]
    assert cloud.calls()[2] == ["scontrol", "requeue", "7"]
    assert steps(cloud) == ["sbatch", "srun", "scontrol", "srun"]


@pytest.mark.parametrize(("codes", "code"), [([2, "hang"], 2), (["hang", 2], 2), ([1, 1], 1)])
def test_a_code_of_1_or_2_is_not_hidden_by_the_kill_of_the_other_tasks(
    cloud: Cloud, codes: list[Any], code: int
) -> None:
    plays(cloud, codes)
    done = cloud.run("sbatch", *RUN)
    assert done.returncode == code, done.stderr
    assert "scontrol" not in steps(cloud)


def test_a_lost_task_sends_the_job_back_to_the_queue(cloud: Cloud) -> None:
    plays(cloud, [137, 75], [0, 0])
    done = cloud.run("sbatch", *RUN)
    assert done.returncode == 0, done.stderr
    assert steps(cloud) == ["sbatch", "srun", "scontrol", "srun"]


def test_restarts_have_an_end(cloud: Cloud) -> None:
    plays(cloud, [75], [75], [75])
    done = cloud.run("sbatch", *RUN, "--max-restarts=2")
    assert done.returncode == 75, done.stderr
    assert steps(cloud) == ["sbatch", *["srun", "scontrol"] * 2, "srun"]


def test_an_image_is_run_by_apptainer_on_every_task(cloud: Cloud) -> None:
    plays(cloud)
    words = ("--dry-run", "--config=c.py", "--workdir=/shared/runs/a", "--apptainer=jax-it.sif")
    done = cloud.run("tpu/slurm.sbatch", *words)
    assert done.returncode == 0, done.stderr
    checkout = cloud.checkout
    assert f"apptainer exec --nv --bind {checkout} --bind /shared/runs jax-it.sif jax-it train" in done.stdout


def test_slurm_is_told_to_requeue_and_to_warn_before_time_is_up(cloud: Cloud) -> None:
    text = (cloud.checkout / "tpu/slurm.sbatch").read_text()
    directives = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    # without B: the signal goes to the tasks, not to the script
    assert {"--requeue", "--signal=TERM@120", "--open-mode=append"} <= set(directives)
    before_commands = text[: text.index("set -euo pipefail")]
    assert all(f"#SBATCH {directive}" in before_commands for directive in directives)  # Slurm reads no others


def test_a_dry_run_prints_every_command_and_calls_nothing(cloud: Cloud) -> None:
    plays(cloud)
    done = cloud.run("tpu/slurm.sbatch", "--dry-run", *RUN[1:])
    assert done.returncode == 0, done.stderr
    commands = [line.split()[0] for line in done.stdout.splitlines()]
    assert commands == ["mkdir", "srun", "#", "scontrol"]
    assert cloud.calls() == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "--config is missing"),
        (("--config=c.py",), "--workdir is missing"),
        (RUN[1:], "submit this file with sbatch"),
        ((*RUN[1:], "--apptainer=x.sif"), "--apptainer and --jax-it exclude each other"),
        ((*RUN[1:], "--nodes=2"), "unknown option --nodes"),
        ((*RUN[1:], "--max-restarts=many"), "a whole number of at least 0 is needed"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(cloud: Cloud, words: tuple[str, ...], says: str) -> None:
    plays(cloud)
    done = cloud.run("tpu/slurm.sbatch", *words)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and says in done.stderr, done.stderr
