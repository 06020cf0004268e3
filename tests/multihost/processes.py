"""Recipes, and the command in several processes of this machine, which are the hosts of one run."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests import tiny_run, xla

STEPS = 8  # of a run; a checkpoint every 4
DEVICES = 8  # of all processes together

T5 = {
    "model_type": "t5", "vocab_size": 120, "d_model": 32, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 8,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "dropout_rate": 0.1,
    "decoder_start_token_id": 0,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": 128, "hidden_size": 32, "head_dim": 4, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 128,
    "eos_token_id": 1,
}  # fmt: skip
# Devices 0 to 3 are those of process 0. Tensor is the innermost axis.
FSDP_AND_TENSOR = ("data=1", "fsdp=4", "tensor=2")  # the processes hold other rows, and other parts of the weights
TENSOR_ACROSS = ("data=1", "fsdp=1", "tensor=8")  # each process makes all rows: its devices hold a part of every one


def write_recipes(folder: Path) -> dict[str, Path]:
    """A config file for each kind of model."""
    text = tiny_run.write_recipe(folder).read_text()
    made = {}
    for name, architecture in (("t5", T5), ("llama", LLAMA)):
        changes = {
            '"60 steps"': f'"{STEPS} steps"',
            '"15 steps"': '"4 steps"',
            "return config": f"config.model.architecture = {architecture!r}\n    return config",
        }
        if name == "llama":
            changes["config.data.max_source_length = 32"] = "config.data.max_seq_length = 48"
            changes["config.data.max_target_length = 16"] = "config.eval.max_new_tokens = 16"
        made[name] = folder / f"{name}.py"
        body = text
        for before, after in changes.items():
            assert before in body
            body = body.replace(before, after, 1)
        made[name].write_text(body)
    return made


class Ended(NamedTuple):
    code: int
    text: str  # standard output and error


def start(count: int, *arguments: Any, devices: int = DEVICES, **environment: Any) -> list[subprocess.Popen[str]]:
    """The command as the processes of one run, with so many fake devices in all."""
    port = free_port()
    return [one(index, count, port, *arguments, devices=devices // count, **environment) for index in range(count)]


def one(
    index: int, count: int, port: int, *arguments: Any, devices: int = 1, **environment: Any
) -> subprocess.Popen[str]:
    """A process of a run. An argument that begins with "import" is Python to run in place of the command."""
    code = arguments[0] if str(arguments[0]).startswith("import") else "from jax_it.cli import main; main()"
    arguments = arguments[1:] if code is arguments[0] else arguments
    surroundings = os.environ | {
        "XLA_FLAGS": xla.flags(devices),
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
        "TF_CPP_MIN_LOG_LEVEL": "1",
        **{name: str(value) for name, value in environment.items()},
    }
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=surroundings, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def ends(processes: Sequence[subprocess.Popen[str]], seconds: float = 240) -> list[Ended]:
    """How the processes ended; all of them are ended if one takes too long."""
    until = time.monotonic() + seconds
    try:
        texts = [process.communicate(timeout=max(until - time.monotonic(), 1))[0] for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.send_signal(signal.SIGABRT)
            process.kill()
        texts = [process.communicate()[0] for process in processes]
        raise AssertionError("it did not end:\n" + "\n----\n".join(texts)) from None
    return [Ended(process.returncode, text) for process, text in zip(processes, texts, strict=True)]


def train(count: int, recipe: Path, run: Path, mesh: Sequence[str], *more: str, devices: int = DEVICES) -> list[Ended]:
    """Trains to the end on so many processes."""
    done = ends(start(count, *command(recipe, run, mesh, *more), devices=devices))
    assert [end.code for end in done] == [0] * count, "\n----\n".join(end.text for end in done)
    return done


def command(recipe: Path, run: Path, mesh: Sequence[str], *more: str) -> list[Any]:
    return ["train", "--config", recipe, "--workdir", run, *(f"--config.mesh.{axis}" for axis in mesh), *more]


def losses(run: Path) -> dict[int, float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines}


def wait_for(happened: Any, processes: Sequence[subprocess.Popen[str]], seconds: float = 180) -> None:
    until = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > until or any(process.poll() is not None for process in processes):
            for process in processes:
                process.kill()
            raise AssertionError("\n----\n".join(process.communicate()[0] for process in processes))
        time.sleep(0.02)
