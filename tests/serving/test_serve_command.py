"""`jax-it serve`: options, what is loaded, and how the process ends."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx2 as httpx
import jax
import numpy as np
import pytest

import jax_it
from jax_it import pretrained
from jax_it.config import Lora, Model
from jax_it.errors import UserError
from jax_it.pretrained import peft
from jax_it.serving.models import load_models
from jax_it.serving.server import read_keys
from jax_it.sharding import inference_mesh
from tests.tiny_run import fails


@pytest.fixture(scope="module")
def adapter(served_folders, tmp_path_factory) -> Path:
    """A PEFT folder over the Llama."""
    base = str(served_folders["llama"])
    lora = Model(path=base, lora=Lora(rank=2))
    mesh = inference_mesh(1)
    model, params = pretrained.load(lora, mesh)
    params["adapter"] = jax.tree.map(lambda leaf: leaf + 0.1, params["adapter"])
    folder = tmp_path_factory.mktemp("adapter") / "peft"
    folder.mkdir()
    peft.save(folder, model, params, base)
    return folder


def test_an_adapter_over_a_model_is_what_it_is_alone(served_folders, adapter):
    served = load_models([("", str(served_folders["llama"]))], [("poems", str(adapter))])
    assert [*served] == ["llama", "poems"] and served["poems"].parent == "llama"
    model, params, _ = jax_it.load(str(adapter))
    assert served["poems"].run.model == model
    for one, other in zip(jax.tree.leaves(served["poems"].params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, other)
    shared = served["poems"].params["embedding"]
    assert shared is served["llama"].params["embedding"]


def test_two_models_of_one_name_are_refused(served_folders):
    llama = str(served_folders["llama"])
    with pytest.raises(UserError, match="two models are called 'llama'; name one of them: --model NAME="):
        load_models([("", llama), ("", llama)], [])


def test_keys_are_read_from_a_file_and_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("one\n\n zwei \n")
    monkeypatch.setenv("JAX_IT_API_KEYS", "three, four")
    assert read_keys(str(file)) == ["three", "four", "one", "zwei"]
    file.write_text("\n")
    with pytest.raises(UserError, match="it has no key; write one on a line"):
        read_keys(str(file))
    with pytest.raises(UserError, match="it cannot be read"):
        read_keys(str(tmp_path / "none"))


@pytest.mark.parametrize(
    "options, message",
    [
        ((), "the following arguments are required: --model"),
        (("--model", "x", "--adapter", "dir"), "--adapter dir: give it a name"),
        (("--model", "x", "--port", "70000"), "argument --port: 70000 is not from 0 to 65535"),
        (("--model", "x", "--host", "256.0.0.1"), "cannot listen on 256.0.0.1 port 8000"),
    ],
)
def test_options_that_cannot_be_are_refused(capfd, options, message):
    assert message in fails(capfd, "serve", *options)


@pytest.mark.slow  # it starts a process
def test_sigterm_lets_running_requests_end_and_the_process_ends_with_0(served_folders):
    command = [
        sys.executable,
        "-c",
        "from jax_it.cli import main; main()",
        "serve",
        "--port",
        "0",
        "--max-new-tokens",
        "400",
    ]
    command += ["--max-prompt-tokens", "32", "--batch-size", "2", "--model", str(served_folders["t5"])]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stderr
        ready = next(line for line in process.stderr if "compiled in" in line)
        url = ready.split(" at ")[1].split(" ")[0]
        body = {"prompt": "Say hello", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"]
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health")
        assert process.wait(30) == 0
        assert '"status": 200' in process.stderr.read()
