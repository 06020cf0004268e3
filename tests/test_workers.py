"""A function over many chunks, in order: in this process, in several, on a Ray cluster of two nodes."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from jax_it import workers
from jax_it.errors import UserError
from jax_it.workers import Workers


def square(number):
    time.sleep(0.01 * (number % 3))
    if number < 0:
        raise UserError(f"{number} is negative")
    return number * number, os.getpid()


def test_results_come_in_order_from_several_processes_that_stay(monkeypatch):
    monkeypatch.setattr(workers, "FEW", 0)
    with Workers(2) as several:
        found = [list(several.map(square, iter(range(20)))) for _ in range(2)]
        with pytest.raises(UserError, match="-1 is negative"):
            list(several.map(square, [3, 2, -1, 1, 0]))
    assert [[result for result, _ in each] for each in found] == [[i * i for i in range(20)]] * 2
    processes = {process for each in found for _, process in each}
    assert len(processes) == 2 and os.getpid() not in processes


@pytest.mark.parametrize(("number", "chunks"), [(0, 20), (1, 20), (2, workers.FEW)])
def test_no_process_is_started_for_few_chunks_or_one_worker(number, chunks):
    with Workers(number) as alone:
        assert {process for _, process in alone.map(square, range(chunks))} == {os.getpid()}


def test_a_process_that_is_killed_ends_the_work_with_a_line(monkeypatch):
    monkeypatch.setattr(workers, "FEW", 0)
    with (
        Workers(2, option="config.data.num_workers") as several,
        pytest.raises(UserError, match=r"a worker process was killed, .*; lower config.data.num_workers"),
    ):
        list(several.map(os._exit, [1, 1, 1]))


# Ray


@pytest.fixture
def no_ray(monkeypatch):
    """A module `ray` must not be needed to see that nothing listens at an address."""
    monkeypatch.setattr(workers, "find_spec", lambda name: True)


def test_an_address_at_which_nothing_listens_is_refused_at_once(no_ray):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(UserError, match=f"--ray {address}: Connection refused; give the address of a running"):
            Workers(ray_address=address)


def test_a_name_that_no_host_has_is_refused(no_ray):
    with pytest.raises(UserError, match=r"--ray no-such.invalid:6379: .*; give the address of a running"):
        Workers(ray_address="no-such.invalid:6379")


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray")
    # In a process of its own: Ray's warnings would be errors here.
    code = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        lines = iter(process.stdout.readline, "")
        yield next(line.strip() for line in lines if line[:1].isdecimal() and ":" in line)
    finally:
        process.communicate(timeout=60)


def on_ray(code, *words):
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_both_nodes_of_a_cluster_work_and_errors_come_back(cluster):
    code = """
import sys, time
from jax_it.errors import UserError
from jax_it.workers import Workers

def node(number):
    import ray
    time.sleep(0.2)
    if number == 15:
        raise UserError("15 is refused")
    return number, ray.get_runtime_context().get_node_id()

with Workers(ray_address=sys.argv[1]) as several:
    found = list(several.map(node, range(12)))
    print([number for number, _ in found] == list(range(12)), len({place for _, place in found}))
    try:
        list(several.map(node, range(12, 20)))
    except UserError as error:
        print(error)
"""
    done = on_ray(code, cluster)
    assert done.stdout.splitlines() == ["True 2", "15 is refused"], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["validate", "--fix"],
        ["dedup"],
        ["decontaminate", "--against", "{tests}"],
        ["filter", "--personal-data", "all", "--redact"],
        ["sample", "--share", "0.5", "--stratify", "task"],
        ["convert", "--to", "messages"],
    ],
    ids=lambda command: command[0],
)
def test_a_cluster_makes_the_bytes_that_one_process_makes(cluster, tmp_path, command):
    words = "oak rain mill lamp coat bird road salt wind song".split()
    texts = [" ".join(words[(i * j + i // 7) % 10] for j in range(1, 14)) for i in range(3000)]
    records = [
        {"task": str(i % 3), "prompt": f"Say: {text} naÃ¯ve me@example.org", "completion": f"{text} {i % 900}"}
        for i, text in enumerate(texts)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "tests.jsonl").write_text(json.dumps({"question": texts[17]}) + "\n")
    command = [word.format(tests=tmp_path / "tests.jsonl") for word in command]
    made = []
    for number, where in enumerate((["--num-workers", "1"], ["--ray", cluster])):
        output = tmp_path / f"{number}.jsonl"
        words = ["data", command[0], str(tmp_path / "a.jsonl"), *command[1:], "--output", str(output), *where]
        done = on_ray("import sys; from jax_it import cli; cli.main(sys.argv[1:])", *words)
        assert done.returncode == 0, done.stderr
        made.append([output.read_bytes(), (tmp_path / f"{number}.jsonl.dropped.jsonl").read_bytes()])
    assert made[0] == made[1] and made[0][0]


@pytest.mark.slow
def test_a_server_that_is_not_ray_is_given_up(tmp_path):
    pytest.importorskip("ray")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: [server.accept() for _ in range(1000)], daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        words = ["data", "validate", str(tmp_path / "a.jsonl"), "--ray", address]
        done = on_ray("import sys; from jax_it import cli; cli.main(sys.argv[1:])", *words)
    assert done.returncode == 2 and f"--ray {address}: " in done.stderr.splitlines()[-1]
