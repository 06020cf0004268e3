"""Two hosts serve as one: what they answer, and how they end."""

import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from jax_it.data import chat
from jax_it.data import tokenizer_files as tokenizers
from jax_it.generation import Engine, generate
from jax_it.generation.requests import GREEDY, Sampling
from jax_it.run import Run, load_run
from tests.data.chat_tokenizers import TEXTS, checkpoint
from tests.harness.conftest import CAUSAL, T5, write
from tests.multihost import processes

LENGTH = 12
OPTIONS = ("--port=0", "--batch-size=4", f"--max-new-tokens={LENGTH}", "--max-prompt-tokens=128")
SYSTEM = "Answer in one word, and say nothing that was not asked for, whatever it is. " * 3  # more than a block
REQUESTS: list[dict[str, Any]] = [
    {"model": "llama", "prompt": ["Say hello", "Who are you?", "Is grass green?"]},
    {"model": "llama", "prompt": "Say hello", "temperature": 1.0, "seed": 3, "n": 3, "logprobs": 2},
    {"model": "llama", "prompt": "Who are you?", "echo": True, "logprobs": 1, "max_tokens": 1},
    {"model": "llama", "prompt": SYSTEM + "Is grass green?"},
    {"model": "llama", "prompt": SYSTEM + "Is the sky blue?", "stop": ["e"]},
    {"model": "llama", "prompt": "Say hello", "use_beam_search": True, "best_of": 3},
    {"model": "t5", "prompt": ["Say hello", "Is grass green?"], "repetition_penalty": 1.2},
    {"model": "t5", "prompt": "Say hello", "use_beam_search": True, "best_of": 2, "n": 2},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    causal = CAUSAL | {"max_position_embeddings": 192}
    return {
        "llama": write(root / "llama", causal, checkpoint("smollm2")),
        "t5": write(root / "t5", T5, tokenizers.train(TEXTS, 300)),
    }


@contextmanager
def serving(count: int, *command: Any) -> Iterator[tuple[str, list[subprocess.Popen[str]]]]:
    """Starts a server on `count` processes with two devices in all; yields its URL once it is ready."""
    hosts = processes.start(count, *command, devices=2)
    try:
        lines = []
        for line in hosts[0].stdout or ():
            lines.append(line)
            if "compiled in" in line:
                yield line.split(" at ")[1].split()[0], hosts
                break
        else:
            raise AssertionError("".join(lines))
    finally:
        for host in hosts:
            host.kill()
            host.communicate()


def both(folders: dict[str, Path]) -> list[str]:
    return [f"--model={folder}" for folder in folders.values()]


def ask(url: str, **body: Any) -> Any:
    response = httpx.post(f"{url}/v1/completions", json={"max_tokens": LENGTH, **body}, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def replies(url: str, requests: Sequence[dict[str, Any]]) -> list[Any]:
    """The texts of requests that come at once."""
    with ThreadPoolExecutor(len(requests)) as threads:
        return list(threads.map(lambda body: ask(url, **body), requests))


def check_same(found: Any, wanted: Any) -> None:
    """Log-probabilities are those of another program where the prompt was prefilled in another way."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for name in wanted:
            check_same(found[name], wanted[name])
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for pair in zip(found, wanted, strict=True):
            check_same(*pair)
    else:
        assert found == (pytest.approx(wanted, abs=1e-5) if isinstance(wanted, float) else wanted)


def offline(run: Run, params: Any, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[str]:
    """The texts that the engine writes in this process."""
    engine = Engine(run.model, run.mesh, LENGTH, 4, sampling, chat.ends(run.tokenizer))
    texts = sorted(generate(engine, params, prompts), key=lambda text: (text.request_id, text.sample))
    return [run.tokenizer.decode(text.tokens) for text in texts]


def test_two_hosts_answer_as_one_and_a_signal_ends_both_after_the_running_requests(folders: dict[str, Path]) -> None:
    run, params = load_run(str(folders["llama"]))
    prompts = run.tokenizer.encode(["Say hello", "Who are you?", "Is grass green?"])
    sampled, beams = Sampling(temperature=1.0, seed=3, num_samples=3), Sampling(num_beams=3)
    requests = [
        {"prompt": prompts},
        {"prompt": prompts[0], "temperature": 1.0, "seed": 3, "n": 3},
        {"prompt": prompts[1], "use_beam_search": True, "best_of": 3},
    ]
    wanted = [
        offline(run, params, prompts, GREEDY),
        offline(run, params, prompts[:1], sampled),
        offline(run, params, prompts[1:2], beams),
    ]
    with serving(2, "serve", *OPTIONS, f"--model={folders['llama']}") as (url, hosts):
        assert [[choice["text"] for choice in choices] for choices in replies(url, requests)] == wanted
        body = {"prompt": "Say hello", "ignore_eos": True, "stream": True, "max_tokens": LENGTH}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            for host in hosts:
                host.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        done = processes.ends(hosts, 60)
        assert [end.code for end in done] == [0, 0], done


@pytest.fixture(scope="module")
def replies_of_one(folders: dict[str, Path]) -> list[Any]:
    with serving(1, "serve", *OPTIONS, *both(folders)) as (url, _):
        return replies(url, REQUESTS)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_two_models_take_turns_and_the_loss_of_a_host_ends_the_other(
    folders: dict[str, Path], replies_of_one: list[Any], lost: int
) -> None:
    with serving(2, "serve", *OPTIONS, *both(folders)) as (url, hosts):
        for _ in range(3):
            check_same(replies(url, REQUESTS), replies_of_one)
        with ThreadPoolExecutor(1) as threads:
            body = {"model": "t5", "prompt": ["Say hello"] * 64, "ignore_eos": True, "max_tokens": LENGTH}
            running = threads.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=60)
            time.sleep(0.2)
            hosts[lost].kill()
            began = time.monotonic()
            ended = processes.ends(hosts, 30)[1 - lost]
            assert time.monotonic() - began < 10
            if lost == 1:  # who waits is told
                assert running.result().status_code == 500
            else:
                assert isinstance(running.exception(), httpx.TransportError)
    assert ended.code == 75, ended
    assert f"(process {lost}) was lost" in ended.text


FAILS_LATE = """import os
from jax_it.generation import Engine
decode, calls = Engine.decode, []
def fails(self, *rest, **named):
    calls.append(named)
    if len(calls) > 10 and os.environ["JAX_PROCESS_ID"] == "1":
        raise ValueError("a fault")
    return decode(self, *rest, **named)
Engine.decode = fails
from jax_it.cli import main
main()
"""


@pytest.mark.slow
def test_an_error_of_the_engine_on_one_host_ends_both(folders: dict[str, Path]) -> None:
    with serving(2, FAILS_LATE, "serve", *OPTIONS, f"--model={folders['t5']}") as (url, hosts):
        for _ in range(2):
            with suppress(httpx.TransportError):
                httpx.post(f"{url}/v1/completions", json={"prompt": "Say hello", "ignore_eos": True}, timeout=60)
        first, second = processes.ends(hosts, 40)
    assert (first.code, second.code) == (75, 1) and "ValueError: a fault" in second.text
