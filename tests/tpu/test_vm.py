"""tpu/vm.sh against a stub of gcloud whose workers are folders of this machine."""

import os
import re
import shutil
import signal
import subprocess
from typing import Any

import pytest

from tests.tpu.stubs import Cloud

PLACE = ("--name=run1", "--zone=us-west4-a", "--project=mine")
RUN = (*PLACE, "--type=v5litepod-16", "--config=configs/flan_t5.py", "--workdir=gs://bucket/run1",
       "--wheel=jax_it-0.1.0-py3-none-any.whl", "--poll=0")  # fmt: skip
WHOLE = ["CREATE", "scp", "ssh setup", "ssh start"]
END = ["ssh log", "DELETE"]


def plays(cloud: Cloud, *runs: list[Any], nodes: tuple[str, ...] = ("run1",), **settings: Any) -> None:
    """Each run says what its workers do: see JAX_IT among the stubs."""
    workers = len(runs[0]) // len(nodes) if runs else 2
    cloud.settings = {
        "runs": runs,
        "workers": workers,
        "everyone": [f"{node}/{worker}" for node in nodes for worker in range(workers)],
        "first_state": "ACCEPTED",
        "outages": 0,
        "refuse": False,
    } | settings


def test_a_run_is_created_set_up_started_on_all_workers_watched_and_deleted(cloud: Cloud) -> None:
    plays(cloud, [0, 0])
    done = cloud.run("tpu/vm.sh", "run", *RUN, "--spot")
    assert done.returncode == 0, done.stderr
    assert cloud.steps() == WHOLE + END
    create = next(words for words in cloud.calls() if "create" in words)
    assert create == ["gcloud", "compute", "tpus", "queued-resources", "create", "run1", "--zone=us-west4-a",
                      "--project=mine", "--node-id=run1", "--accelerator-type=v5litepod-16",
                      "--runtime-version=v2-alpha-tpuv5-lite", "--spot", "--quiet"]  # fmt: skip
    for worker in (0, 1):
        words, environment, folder = cloud.started(f"run1-{worker}")
        assert words == ["train", "--config", "configs/flan_t5.py", "--workdir", "gs://bucket/run1"]
        assert environment["JAX_COMPILATION_CACHE_DIR"] == "gs://bucket/jax_cache"
        assert folder.endswith(f"machines/run1/{worker}/jax-it/source")
        log = (cloud.checkout / f"runs/logs/run1/attempt-0/run1/{worker}.log").read_text()
        assert f"step 0 of run1/{worker}" in log and "exit code 0" in log
    assert not (cloud.folder / "state").exists()


def test_a_pre_empted_tpu_is_deleted_created_again_set_up_and_started(cloud: Cloud) -> None:
    plays(cloud, ["preempt", 0], [0, 0])
    done = cloud.run("tpu/vm.sh", "run", *RUN, "--spot")
    assert done.returncode == 0, done.stderr
    assert cloud.steps() == [*WHOLE, "DELETE", *WHOLE, *END]
    assert cloud.started("run1-1", attempt=1)[0] == cloud.started("run1-1")[0]


def test_a_run_that_was_interrupted_is_started_again_on_the_same_tpu(cloud: Cloud) -> None:
    plays(cloud, [75, 75], [134, 75], [0, 0])
    done = cloud.run("tpu/vm.sh", "run", *RUN)
    assert done.returncode == 0, done.stderr
    assert cloud.steps() == [*WHOLE, "ssh log", "ssh start", "ssh log", "ssh start", *END]


@pytest.mark.parametrize(("codes", "code"), [([2, 2], 2), ([75, 2], 2), ([1, 75], 1), ([2, 137], 2)])
def test_a_code_of_1_or_2_stops_without_a_restart_and_gives_the_tpu_back(
    cloud: Cloud, codes: list[int], code: int
) -> None:
    plays(cloud, codes)
    done = cloud.run("tpu/vm.sh", "run", *RUN)
    assert done.returncode == code, done.stderr
    assert cloud.steps() == WHOLE + END


def test_a_worker_that_was_killed_makes_its_peers_1_no_fault_of_theirs(cloud: Cloud) -> None:
    plays(cloud, [1, 137], [0, 0])
    done = cloud.run("tpu/vm.sh", "run", *RUN)
    assert done.returncode == 0, done.stderr
    assert cloud.steps() == [*WHOLE, "ssh log", "ssh start", *END]


def test_workers_that_go_on_after_another_has_failed_are_stopped_with_sigterm(cloud: Cloud) -> None:
    plays(cloud, [134, "hang"], [0, 0])
    done = cloud.run("tpu/vm.sh", "run", *RUN)
    assert done.returncode == 0, done.stderr
    assert cloud.steps() == [*WHOLE, "ssh stop", "ssh log", "ssh start", *END]
    assert "134 75" in done.stderr


def test_restarts_have_an_end(cloud: Cloud) -> None:
    plays(cloud, [75, 75], [75, 75], [75, 75])
    done = cloud.run("tpu/vm.sh", "run", *RUN, "--max-restarts=2")
    assert done.returncode == 75, done.stderr
    assert cloud.steps().count("ssh start") == 3
    assert cloud.steps()[-1] == "DELETE"


def test_several_slices_are_one_request_and_start_together(cloud: Cloud) -> None:
    plays(cloud, [0, 0, 0, 0], nodes=("run1-0", "run1-1"))
    done = cloud.run("tpu/vm.sh", "run", *RUN, "--slices=2")
    assert done.returncode == 0, done.stderr
    create = next(words for words in cloud.calls() if "create" in words)
    assert {"--node-count=2", "--node-prefix=run1"} <= set(create)
    assert not [word for word in create if word.startswith("--node-id")]
    started = sorted(path.name for path in cloud.folder.glob("argv-*"))
    assert started == ["argv-run1-0-0-0", "argv-run1-0-1-0", "argv-run1-1-0-0", "argv-run1-1-1-0"]


def test_keep_leaves_the_tpu(cloud: Cloud) -> None:
    plays(cloud, [0, 0])
    done = cloud.run("tpu/vm.sh", "run", *RUN, "--keep")
    assert done.returncode == 0, done.stderr
    assert "DELETE" not in cloud.steps()
    assert (cloud.folder / "state").exists()


def started_by_hand(cloud: Cloud) -> None:
    for verb in ("create", "wait", "setup", "start"):
        done = cloud.run("tpu/vm.sh", verb, *RUN)
        assert done.returncode == 0, done.stderr


def while_another_does(cloud: Cloud, verb: str) -> subprocess.CompletedProcess[str]:
    """What becomes of `run` when the verb is called elsewhere, once `run` has looked at the TPU and its workers."""
    looked = f"until (($(wc -l <$STUB/calls) >= {len(cloud.calls()) + 4})); do sleep 0.1; done"
    other = ["bash", "-c", f"{looked}; tpu/vm.sh {verb} --name=run1 --zone=us-west4-a --poll=0"]
    environment = {"PATH": f"{cloud.folder}/bin:/usr/bin:/bin", "STUB": str(cloud.folder)}
    with subprocess.Popen(other, cwd=cloud.checkout, env=environment, stderr=subprocess.DEVNULL):
        return cloud.run("tpu/vm.sh", "run", *RUN)


def test_called_again_it_takes_up_a_run_that_is_under_way(cloud: Cloud) -> None:
    plays(cloud, ["hang", "hang"], [0, 0])
    started_by_hand(cloud)
    status = cloud.run("tpu/vm.sh", "status", *PLACE)
    assert status.stdout.count(" running | ") == 2, status.stdout + status.stderr
    before = len(cloud.steps())
    done = while_another_does(cloud, "stop")
    assert done.returncode == 0, done.stderr
    steps = cloud.steps()[before:]
    assert steps[0] == "ssh stop"
    # Without a pause between looks `run` may see one worker ended and the other saving, and stop that one too.
    assert [step for step in steps if step != "ssh stop"] == ["ssh log", "ssh start", *END]


def test_a_tpu_that_somebody_has_deleted_is_not_asked_for_again(cloud: Cloud) -> None:
    plays(cloud, ["hang", "hang"])
    started_by_hand(cloud)
    pids = [int((cloud.folder / f"machines/run1/{worker}/jax-it/run/pid").read_text()) for worker in (0, 1)]
    try:
        done = while_another_does(cloud, "delete")
    finally:
        for pid in pids:
            os.killpg(pid, signal.SIGKILL)
    assert done.returncode == 2
    assert "somebody has deleted run1" in done.stderr
    assert cloud.steps() == [*WHOLE, "DELETE"]


def test_a_run_that_a_reboot_has_ended_counts_as_killed(cloud: Cloud) -> None:
    plays(cloud, ["hang", "hang"])
    started_by_hand(cloud)
    runs = [cloud.folder / f"machines/run1/{worker}/jax-it/run" for worker in (0, 1)]
    try:
        for run in runs:
            (run / "boot").write_text("another boot")  # after it another process may have the number of the run's
        assert cloud.run("tpu/vm.sh", "status", *PLACE).stdout.count(" lost | ") == 2
        done = cloud.run("tpu/vm.sh", "watch", *PLACE)
        assert done.returncode == 75 and "137 137" in done.stderr, done.stderr
    finally:
        for run in runs:
            os.killpg(int((run / "pid").read_text()), signal.SIGKILL)


def test_watch_gives_the_exit_code_and_changes_nothing(cloud: Cloud) -> None:
    plays(cloud, [75, 75])
    started_by_hand(cloud)
    done = cloud.run("tpu/vm.sh", "watch", *PLACE, "--poll=0")
    assert done.returncode == 75, done.stderr
    assert cloud.steps() == WHOLE


def test_an_outage_of_gcloud_is_waited_for(cloud: Cloud) -> None:
    plays(cloud, [0, 0], outages=4)
    done = cloud.run("tpu/vm.sh", "run", *RUN)
    assert done.returncode == 0, done.stderr
    assert cloud.steps() == WHOLE + END


def test_a_gcloud_that_never_answers_is_said_at_once(cloud: Cloud) -> None:
    plays(cloud, outages=100)
    (cloud.folder / "state").write_text("ACTIVE")
    done = cloud.run("tpu/vm.sh", "run", *RUN, "--poll=60")
    assert done.returncode == 2
    assert done.stderr == "vm.sh: gcloud does not answer: ERROR: 503 the service is currently unavailable\n"
    assert cloud.steps() == []


def test_a_request_that_is_refused_ends_with_2(cloud: Cloud) -> None:
    plays(cloud, refuse=True)
    done = cloud.run("tpu/vm.sh", "run", *RUN)
    assert done.returncode == 2
    assert "quota exceeded" in done.stderr
    assert cloud.steps() == ["CREATE"]


def test_a_request_that_fails_again_and_again_ends_with_2(cloud: Cloud) -> None:
    plays(cloud, first_state="FAILED")
    done = cloud.run("tpu/vm.sh", "run", *RUN)
    assert done.returncode == 2, done.stderr
    assert cloud.steps().count("CREATE") == 3


def test_options_of_jax_it_arrive_as_they_were_written(cloud: Cloud) -> None:
    plays(cloud, [0, 0])
    rest = [
        "--config.data.train.0.template={{q}} ||| {{a}}",
        '--config.x=it\'s "$HOME" `id` \\ *',
        "--config.y=a\nb",
        "",
    ]
    done = cloud.run("tpu/vm.sh", "run", *RUN, "--", *rest)
    assert done.returncode == 0, done.stderr
    for worker in (0, 1):
        assert cloud.started(f"run1-{worker}")[0][5:] == rest


def test_values_of_the_environment_travel_in_a_file_and_in_no_command(cloud: Cloud) -> None:
    plays(cloud, [0, 0])
    options = ("--env=HF_TOKEN", "--env=GREETING=it's me", "--cache=none")
    done = cloud.run("tpu/vm.sh", "run", *RUN, *options, HF_TOKEN="hf_secret $1")
    assert done.returncode == 0, done.stderr
    environment = cloud.started("run1-0")[1]
    assert environment["HF_TOKEN"] == "hf_secret $1"
    assert environment["GREETING"] == "it's me"
    assert "JAX_COMPILATION_CACHE_DIR" not in environment
    assert "hf_secret" not in str(cloud.calls()) + done.stderr + done.stdout


def test_a_revision_is_installed_with_the_config_as_it_is_on_the_disk(cloud: Cloud) -> None:
    plays(cloud, [0, 0])
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@x", "-c", "init.defaultBranch=main"]
    for words in (["init", "-q"], ["add", "tpu", "constraints", "configs"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], cwd=cloud.checkout, check=True)
    (cloud.checkout / "mine.py").write_text("mine")
    (cloud.checkout / "constraints/new.txt").write_text("not committed")
    words = [word for word in RUN if not word.startswith(("--wheel", "--config"))]
    done = cloud.run("tpu/vm.sh", "run", *words, "--config=mine.py:arg", "--extras=tpu", "--keep")
    assert done.returncode == 0, done.stderr
    home = cloud.folder / "machines/run1/0"
    assert (home / "jax-it/source/mine.py").read_text() == "mine"
    assert not (home / "jax-it/source/constraints/new.txt").exists()
    assert (home / "installed").read_text() == ".[tpu]"
    assert cloud.started("run1-0")[0][2] == "mine.py:arg"


def test_a_wheel_is_installed_with_the_extras(cloud: Cloud) -> None:
    plays(cloud, [0, 0])
    assert cloud.run("tpu/vm.sh", "run", *RUN, "--keep").returncode == 0
    installed = (cloud.folder / "machines/run1/1/installed").read_text()
    assert installed == "./jax_it-0.1.0-py3-none-any.whl[tpu,gcs]"


def test_a_set_up_that_fails_three_times_ends_with_2_and_keeps_the_tpu(cloud: Cloud) -> None:
    plays(cloud, [0, 0])
    shutil.rmtree(cloud.checkout / "constraints")
    (cloud.checkout / "constraints").mkdir()
    done = cloud.run("tpu/vm.sh", "run", *RUN)
    assert done.returncode == 2, done.stderr
    assert cloud.steps() == ["CREATE", *["scp", "ssh setup"] * 3]


def test_a_dry_run_prints_every_command_and_calls_nothing(cloud: Cloud) -> None:
    plays(cloud, [0, 0])
    done = cloud.run("tpu/vm.sh", "run", *RUN, "--dry-run", "--slices=2", "--", "--config.x=a b")
    assert done.returncode == 0, done.stderr
    assert cloud.calls() == []
    printed = []
    for line in done.stdout.splitlines():
        if match := re.match(r"gcloud compute tpus (queued-resources|tpu-vm) (\w+) (\S+)(.*worker\.sh (\w+))?", line):
            printed.append(" ".join(word for word in match.group(2, 3, 5) if word))
    both = lambda text: [text.format("run1-0"), text.format("run1-1")]  # noqa: E731
    assert [line for line in printed if not line.startswith("scp")] == [
        "create run1", "describe run1", *both("ssh {} setup"), *both("ssh {} start"),
        "describe run1", *both("ssh {} status"), *both("ssh {} log"), "delete run1",
    ]  # fmt: skip
    assert sum(line.startswith("scp") for line in printed) == 2
    assert r"'\''--config.x=a b'\''" in done.stdout  # quoted for the shell here and the one there


def test_a_recipe_is_named_and_nothing_is_sent_along(cloud: Cloud) -> None:
    plays(cloud)
    words = [word for word in RUN if not word.startswith("--config")]
    done = cloud.run("tpu/vm.sh", "run", *words, "--config=flan_t5:xl,16", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "flan_t5:xl,16" in done.stdout and "tar -rf" not in done.stdout


def test_the_commands_of_a_dry_run_are_those_of_the_run(cloud: Cloud) -> None:
    plays(cloud, [0, 0])
    printed = cloud.run("tpu/vm.sh", "run", *RUN, "--dry-run").stdout.splitlines()
    done = cloud.run("tpu/vm.sh", "run", *RUN)
    shown = [line.removeprefix("+ ") for line in done.stderr.splitlines() if line.startswith("+ ")]
    without_scratch = lambda line: re.sub(r"/tmp/tmp\.\w+", "SCRATCH", line)  # noqa: E731
    expected = [
        without_scratch(line) for line in printed if " describe " not in line and "worker.sh status" not in line
    ]
    assert [without_scratch(line) for line in shown] == expected


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "a verb is missing"),
        (("begin",), "unknown verb begin"),
        (("delete", "--zone=z"), "--name is missing"),
        (("delete", "--name=run1"), "--zone is missing"),
        (("delete", "--name=Run_1", "--zone=z"), "--name=Run_1: lower-case letters"),
        (("delete", "--name", "--zone=z"), "--name needs a value"),
        (("run", *PLACE, "--workdir=gs://b/r", "--config=c.py"), "--type is missing"),
        (("run", *RUN, "--spot", "--reserved"), "--spot and --reserved exclude each other"),
        (("run", *RUN, "--type=v99-8"), "no default --runtime is known for it"),
        (("run", *RUN, "--workdir=runs/x"), "each worker has its own disk"),
        (("run", *RUN, "--config=configs/none.py"), "configs/none.py: no such file"),
        (("run", *RUN, "--config=/etc/hostname"), "only files below the current folder"),
        (("run", *RUN, "--python=3.10"), "jax_it needs 3.11, 3.12 or 3.13"),
        (("run", *RUN, "--slices=0"), "--slices=0: a whole number of at least 1 is needed"),
        (("run", *RUN, "--env=NOT_SET_HERE"), "it is not set in your environment"),
        (("run", *RUN, "--config.train.seed=1"), "unknown option --config.train.seed"),
        (("run", *RUN, "seed=1"), "unknown word seed=1; options for jax-it go after --"),
        (("wait", *PLACE), "no queued resource run1 in us-west4-a"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(cloud: Cloud, words: tuple[str, ...], says: str) -> None:
    plays(cloud)
    done = cloud.run("tpu/vm.sh", *words)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("vm.sh: ")]
    assert len(errors) == 1 and says in errors[0], done.stderr
    assert all("describe" in words for words in cloud.calls())


def test_options_can_come_from_the_environment(cloud: Cloud) -> None:
    plays(cloud)
    done = cloud.run("tpu/vm.sh", "delete", "--dry-run", JAX_IT_NAME="run1", CLOUDSDK_COMPUTE_ZONE="us-west4-a")
    assert done.stdout == "gcloud compute tpus queued-resources delete run1 --zone=us-west4-a --force --quiet\n"
