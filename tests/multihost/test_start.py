"""How processes find each other, and what they say of one that does not come or has gone."""

import signal
import socket
import subprocess

import pytest

from jax_it import hosts
from jax_it.errors import Interrupted, UserError
from jax_it.hosts import cluster_env
from tests.multihost import processes

VARIABLES = (
    "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JOB_COMPLETION_INDEX", "HOSTNAME",
    "SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID",
    "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE",
    "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID", "MEGASCALE_SLICE_ID", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip

# What a process does that joins the run, and says what it met with as the command does.
JOIN = """import sys, time
from jax_it import hosts
from jax_it.errors import Interrupted, UserError
try:
    hosts.start()
    print("started", flush=True)
    {then}
except UserError as error:
    print("UserError:", error)
    hosts.leave(2, str(error))
except Interrupted as error:
    print("Interrupted:", error)
    hosts.leave(75, "has stopped")
hosts.leave(0)
"""


def join(count: int, indices: tuple[int, ...], then: str = "pass", **environment: object) -> list[subprocess.Popen]:
    port = processes.free_port()
    return [processes.one(i, count, port, JOIN.format(then=then), **environment) for i in indices]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def setenv(monkeypatch: pytest.MonkeyPatch, **variables: object) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def test_a_laptop_waits_for_nobody() -> None:
    assert cluster_env.detect() is None
    hosts.start()
    hosts.barrier("alone")
    with hosts.first_then_others():
        pass
    assert hosts.is_first() and hosts.all_agree(True) and not hosts.all_agree(False)
    assert hosts.from_first(lambda: "made") == "made"


def test_one_slurm_task_and_a_run_of_one_process_wait_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = {"SLURM_JOB_ID": 7, "SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": 8, "SLURM_PROCID": 0, "SLURM_LOCALID": 0}
    setenv(monkeypatch, **slurm, SLURM_STEP_NUM_TASKS=1)  # srun -n 1 within a larger job
    assert cluster_env.detect() is None
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    found = cluster_env.detect()
    assert found is not None and found.num_processes == 8
    setenv(monkeypatch, JAX_NUM_PROCESSES=1)
    assert cluster_env.detect() is None


def test_slurm_tells_the_hosts_and_which_devices_are_a_tasks_own(monkeypatch: pytest.MonkeyPatch) -> None:
    setenv(
        monkeypatch, SLURM_JOB_ID=7, SLURM_STEP_NODELIST="gpu[01-02],big", SLURM_NTASKS=5, SLURM_PROCID=3,
        SLURM_LOCALID=1, SLURM_STEP_NUM_NODES=3, SLURM_STEP_TASKS_PER_NODE="2(x2),1",
    )  # fmt: skip
    found = cluster_env.detect()
    assert found is not None
    assert (found.process_id, found.num_processes, found.local_device_ids) == (3, 5, [1])
    assert found.names == {0: "gpu01", 1: "gpu01", 2: "gpu02", 3: "gpu02", 4: "big"}
    assert found.coordinator_address.startswith("gpu01:")
    setenv(monkeypatch, CUDA_VISIBLE_DEVICES="3")  # Slurm shows each task its own device
    again = cluster_env.detect()
    assert again is not None and again.local_device_ids is None
    setenv(monkeypatch, SLURM_STEP_NUM_NODES=5, CUDA_VISIBLE_DEVICES="0,1,2,3")  # a task for each host: all are its
    alone = cluster_env.detect()
    assert alone is not None and alone.local_device_ids is None


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n1,m2", ["n1", "m2"]),
        ("gpu[1-3]", ["gpu1", "gpu2", "gpu3"]),
        ("n[08-10,12],login", ["n08", "n09", "n10", "n12", "login"]),
        ("a[1-2]b[3-4]", ["a1b3", "a1b4", "a2b3", "a2b4"]),
    ],
)
def test_slurms_lists_of_nodes_are_read(text: str, names: list[str]) -> None:
    assert cluster_env.expand_nodes(text) == names


def test_names_come_from_the_tpus_workers_and_from_the_jobs_pods(monkeypatch: pytest.MonkeyPatch) -> None:
    setenv(monkeypatch, TPU_WORKER_HOSTNAMES="t-0,t-1", MEGASCALE_SLICE_ID=1)
    assert cluster_env.host_names(3, 4) == {2: "t-0", 3: "t-1"}  # of the other slice it is not told
    setenv(monkeypatch, TPU_WORKER_HOSTNAMES="WARNING: could not determine TPU worker hostnames, please set it")
    assert list(cluster_env.host_names(3, 4)) == [3]  # libtpu's, where there is no TPU
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES")
    setenv(monkeypatch, HOSTNAME="tune-workers-0-1", JOB_COMPLETION_INDEX=1)
    assert cluster_env.host_names(1, 3) == {i: f"tune-workers-0-{i}" for i in range(3)}


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "host"}, "JAX_COORDINATOR_ADDRESS: 'host' is not HOST:PORT"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "JAX_NUM_PROCESSES: '' is not a number"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": 2}, "JAX_PROCESS_ID: '' is not a number"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": 2, "JAX_PROCESS_ID": 2}, "JAX_PROCESS_ID: 2 must be"),
    ],
)
def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch, variables: dict, wanted: str) -> None:
    setenv(monkeypatch, **variables)
    with pytest.raises(UserError, match=f"^{wanted}"):
        cluster_env.detect()


def test_a_jobs_index_stands_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    setenv(monkeypatch, JAX_COORDINATOR_ADDRESS="h:1", JAX_NUM_PROCESSES=4, JOB_COMPLETION_INDEX=2)
    found = cluster_env.detect()
    assert found is not None and (found.process_id, found.num_processes) == (2, 4)


def test_the_host_that_is_missing_is_named_to_all_that_have_come() -> None:
    done = processes.ends(join(3, (0, 2), JAX_IT_START_TIMEOUT=5, SLURM_JOB_NODELIST="n[1-3]"))
    assert [end.code for end in done] == [75, 75]
    for end in done:
        assert "Interrupted: n2 (process 1) did not come within" in end.text and "n3" not in end.text


def test_a_first_host_that_is_missing_is_named() -> None:
    (end,) = processes.ends(join(2, (1,), JAX_IT_START_TIMEOUT=1))
    assert end.code == 75
    assert "Interrupted: process 0 at localhost:" in end.text and "did not answer in time" in end.text


def test_what_is_no_process_of_the_run_is_not_taken_for_one() -> None:
    port = processes.free_port()
    first = processes.one(0, 2, port, JOIN.format(then="pass"), JAX_IT_START_TIMEOUT=60)
    processes.wait_for(lambda: _sends(port, b"GET / HTTP/1.1\r\n\r\n") and _sends(port, b'{"count": 2}\n'), [first])
    second = processes.one(1, 2, port, JOIN.format(then="pass"), JAX_IT_START_TIMEOUT=60)
    assert [end.code for end in processes.ends([first, second])] == [0, 0]


def _sends(port: int, content: bytes) -> bool:
    try:
        with socket.create_connection(("localhost", port), timeout=1) as stream:
            stream.sendall(content)
        return True
    except OSError:
        return False


FIRST_FAILS = """
    with hosts.first_then_others():
        assert hosts.is_first(), "the others have come past a failure"
        raise UserError("train.jsonl, line 3: no JSON")
"""


def test_the_others_end_with_the_line_of_a_first_that_fails() -> None:
    first, second = processes.ends(join(2, (0, 1), FIRST_FAILS))
    assert (first.code, second.code) == (2, 2)
    assert "UserError: train.jsonl, line 3: no JSON" in first.text
    assert "(process 0): train.jsonl, line 3: no JSON" in second.text
    assert "Terminating process" not in second.text  # JAX's abort, when its coordinator goes first


FIRST_HAS_A_FAULT = """
    try:
        with hosts.watched(), hosts.first_then_others():
            1 / 0
    except ZeroDivisionError as error:
        print("ZeroDivisionError")
        hosts.leave(1, str(error))
"""


def test_a_fault_of_the_first_is_its_own_and_stops_the_others() -> None:
    first, second = processes.ends(join(2, (0, 1), FIRST_HAS_A_FAULT))
    assert (first.code, second.code) == (1, 75)
    assert "ZeroDivisionError" in first.text
    assert "(process 0) has failed: division by zero, which its own log shows" in second.text


ORDER = """
    with hosts.first_then_others():
        print(time.time(), flush=True)
        time.sleep(0.5)
    assert not hosts.all_agree(hosts.is_first()) and hosts.all_agree(True)
    assert hosts.from_first(lambda: "made by " + str(hosts.is_first())) == "made by True"
"""


def test_the_others_come_after_the_first_and_get_what_it_has_made() -> None:
    done = processes.ends(join(2, (0, 1), ORDER))
    assert [end.code for end in done] == [0, 0], done
    first, second = (float(end.text.split("started\n")[1].split()[0]) for end in done)
    assert second >= first + 0.5


def test_a_process_that_is_stuck_while_another_dies_is_ended_and_says_why() -> None:
    stuck = "hosts.connections.GRACE = 1; time.sleep(1000)"
    pair = join(2, (0, 1), stuck)
    for process in pair:
        assert process.stdout is not None and process.stdout.readline() == "started\n"
    pair[1].send_signal(signal.SIGKILL)
    first, _ = processes.ends(pair, seconds=60)
    assert first.code == 75
    assert "(process 1) was lost" in first.text and "training continues from its last checkpoint" in first.text


def test_a_silent_host_is_lost_after_a_while() -> None:
    pair = join(2, (0, 1), 'hosts.barrier("never") if hosts.is_first() else time.sleep(1000)', JAX_IT_LOST_AFTER=2)
    for process in pair:
        assert process.stdout is not None and process.stdout.readline() == "started\n"
    pair[1].send_signal(signal.SIGSTOP)  # as one whose network is gone
    try:
        first = processes.ends(pair[:1], seconds=60)[0]
    finally:
        pair[1].kill()
        pair[1].communicate()
    assert first.code == 75 and "was lost: nothing was heard of it for 2 s" in first.text


def test_an_error_within_a_watched_block_is_left_alone_where_nobody_is_lost() -> None:
    with pytest.raises(ZeroDivisionError), hosts.watched():
        raise ZeroDivisionError
    with pytest.raises(Interrupted), hosts.watched():
        raise Interrupted("stopped")
