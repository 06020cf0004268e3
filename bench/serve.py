"""A load of many clients on `jax-it serve`: no answer wrong or crossed, no 5xx, how fast, and how much memory.

    python bench/serve.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data data/t0/train.jsonl.gz
    python bench/serve.py --model runs/quickstart/export --data FILE.jsonl --clients 20 --seconds 20    # a quick look
    python bench/serve.py … --peer --peer-python .venv-parity/bin/python    # and the same load on a peer

Clients ask for T0's prompts, cut at 512 tokens, greedily, with as many new tokens as the prompt's own completion has,
at most 64. Each waits a random time after each answer, exponentially distributed, so that requests arrive as a Poisson
process. Most streams are read to their end; some are cut by the client, some answers are not streamed, and some
requests are bad, which must be answered with 400 or 413. Before the server starts, every prompt is answered offline,
by the engine of `jax-it generate`, and every reply must be that text, or the beginning of it.

A second load has one client, without waiting: one request at a time. The peer of a causal model is `transformers
serve` with continuous batching, that of an encoder-decoder a FastAPI app around `model.generate` that batches the
requests of a few milliseconds, both in PyTorch with the same weights in float32. Servers run one after the other,
`--rounds` times in turn; each round starts new processes.
"""

import argparse
import asyncio
import gzip
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import quantiles
from typing import Any

LONGEST, LONGEST_NEW = 512, 64  # tokens of a prompt, and new ones
CANCELLED, WHOLE, BAD = 0.05, 0.15, 0.03  # shares of requests: cut by the client, not streamed, bad
BODIES = (b"{", b'{"prompt": "x", "temperature": -1}', b'{"prompt": "x", "zeal": 1}', b'{"prompt": [0, 99999999]}')


@dataclass(frozen=True)
class Question:
    prompt: str
    max_tokens: int
    answer: str  # as generated offline


@dataclass
class Load:
    """What was seen from the clients' side."""

    seconds: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[tuple[str, str]] = field(default_factory=list)  # (expected, answered)
    errors: Counter[str] = field(default_factory=Counter)  # of connections
    cancelled: int = 0
    tokens: int = 0
    first: list[float] = field(default_factory=list)  # seconds to the first token
    between: list[float] = field(default_factory=list)  # seconds per later token, by request
    memory: list[float] = field(default_factory=list)  # MiB of the server, once a second

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


# Questions and their answers


def questions(folder: str, data: str, number: int, seed: int) -> list[Question]:
    """Draw questions, and answer each by the engine alone."""
    import jax

    from jax_it.data import chat
    from jax_it.generation import Engine, generate
    from jax_it.predict import encode
    from jax_it.run import load_run

    run, params = load_run(folder)
    tokenizer = run.tokenizer
    opened = gzip.open if data.endswith(".gz") else open
    with opened(data, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    drawn = random.Random(seed).sample(rows, min(number, len(rows)))
    prompts = [tokenizer.decode(tokenizer.encode([row["prompt"]])[0][: LONGEST - 8]) for row in drawn]
    limits = [min(LONGEST_NEW, len(tokenizer.encode([row["completion"]])[0]) + 1) for row in drawn]
    encoded = encode(run.format, tokenizer, prompts, raw=True)
    engine = Engine(run.model, run.mesh, LONGEST_NEW, min(32, len(prompts)), eos_ids=chat.ends(tokenizer))
    tokens = {output.request_id: output.tokens for output in generate(engine, params, encoded)}
    print(f"{len(prompts)} questions answered offline; jax {jax.__version__}", file=sys.stderr)
    answers = [tokenizer.decode(tokens[i][:limit]) for i, limit in enumerate(limits)]
    return [Question(*each) for each in zip(prompts, limits, answers, strict=True)]


# The clients


async def put_load(
    url: str, asked: Sequence[Question], clients: int, seconds: float, wait: float, options: Any
) -> Load:
    """Let clients ask for some seconds, with that mean wait between an answer and the next request."""
    import aiohttp

    load, begin = Load(), time.monotonic()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=connector, timeout=aiohttp.ClientTimeout(600)) as session:

        async def client(number: int) -> None:
            draw = random.Random(f"{options.seed} {number}")
            await asyncio.sleep(draw.random() * wait)
            while (now := time.monotonic() - begin) < seconds:
                try:
                    await ask(session, draw, load, options, asked[draw.randrange(len(asked))])
                except (aiohttp.ClientError, TimeoutError) as error:
                    load.errors[type(error).__name__] += 1
                if wait:
                    await asyncio.sleep(min(draw.expovariate(1 / wait), max(0.0, seconds - now)))

        async def watch() -> None:
            while True:
                load.memory.append(memory(options.pid))
                await asyncio.sleep(1)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(client(number) for number in range(clients)))
        watching.cancel()
    load.seconds = time.monotonic() - begin
    return load


async def ask(session: Any, draw: random.Random, load: Load, options: Any, question: Question) -> None:
    kind = draw.random()
    if kind < BAD and options.mixed:
        body = draw.choice([*BODIES, json.dumps({"prompt": "x " * 20_000}).encode()])
        headers = {"Content-Type": "application/json"}
        async with session.post("/v1/completions", data=body, headers=headers) as response:
            await response.read()
            load.statuses[response.status] += 1
            if options.is_ours and response.status not in (400, 413, 429):
                load.wrong.append(("400", f"{response.status} for {body[:50]!r}"))
        return
    stream = not (options.mixed and kind < BAD + WHOLE) and options.streams
    cut = options.mixed and kind > 1 - CANCELLED
    body = {
        "model": options.name, "prompt": question.prompt, "max_tokens": question.max_tokens, "temperature": 0,
        "stream": stream,
    }  # fmt: skip
    if options.is_ours and stream:
        body["stream_options"] = {"include_usage": True}
    began, first, last, parts, usage, text = time.monotonic(), 0.0, 0.0, 0, None, ""
    async with session.post("/v1/completions", json=body) as response:
        load.statuses[response.status] += 1
        if response.status != 200:
            await response.read()
            return
        if not stream:
            if cut:
                load.cancelled += 1
                return
            found = await response.json()
            text, usage = found["choices"][0]["text"], found["usage"]["completion_tokens"]
            first = last = time.monotonic()
        else:
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[len(b"data: ") :])
                if "error" in event:
                    load.errors[f"in a stream: {event['error'].get('message', '')[:80]}"] += 1
                    return
                if event.get("usage"):
                    usage = event["usage"]["completion_tokens"]
                if event["choices"] and (added := event["choices"][0].get("text")):
                    text, last, parts = text + added, time.monotonic(), parts + 1
                    first = first or last
                    if cut and parts == 2:
                        break
    if cut:
        load.cancelled += 1
    number = parts if usage is None or cut else usage
    load.tokens += number
    if first:
        load.first.append(first - began)
    if stream and number > 1 and not cut:
        load.between.append((last - first) / (number - 1))
    right = question.answer.startswith(text) if cut else question.answer == text
    if not right:
        load.wrong.append((question.answer, text))


def memory(pid: int) -> float:
    """Return the resident MiB of a process."""
    with open(f"/proc/{pid}/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


# The servers


@contextmanager
def running(command: Sequence[str], port: int, log: Path, ready: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server, wait until it is ready, and end it. Yields its process."""
    import urllib.error
    import urllib.request

    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            while True:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}{ready}", timeout=5):
                        break
                except OSError:
                    if process.poll() is not None:
                        sys.exit(f"{command[0]} ended with {process.returncode}; see {log}")
                    time.sleep(0.5)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                process.kill()
    print(f"{Path(command[0]).name} ended with {process.returncode} after SIGTERM", file=sys.stderr)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def micro_batches(folder: str, port: int, batch_size: int) -> None:
    """Serve an encoder-decoder as people write it: `model.generate` over the requests of a few milliseconds."""
    import torch
    import uvicorn
    from fastapi import FastAPI
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    app = FastAPI()
    waiting: asyncio.Queue[tuple[dict[str, Any], asyncio.Future[dict[str, Any]]]] = asyncio.Queue()
    tasks: list[asyncio.Task[None]] = []

    def generate(bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        inputs = tokenizer([body["prompt"] for body in bodies], return_tensors="pt", padding=True)
        with torch.inference_mode():
            longest = max(body["max_tokens"] for body in bodies)
            outputs = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
        found = []
        for body, output in zip(bodies, outputs[:, 1:].tolist(), strict=True):
            tokens = output[: body["max_tokens"]]
            if tokenizer.eos_token_id in tokens:
                tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            found.append({"choices": [{"text": text}], "usage": {"completion_tokens": len(tokens)}})
        return found

    async def work() -> None:
        while True:
            batch = [await waiting.get()]
            await asyncio.sleep(0.005)
            while len(batch) < batch_size and not waiting.empty():
                batch.append(waiting.get_nowait())
            batch = [(body, future) for body, future in batch if not future.cancelled()]
            if batch:
                answers = await asyncio.to_thread(generate, [body for body, _ in batch])
                for (_, future), answer in zip(batch, answers, strict=True):
                    if not future.done():
                        future.set_result(answer)

    @app.post("/v1/completions")
    async def completions(body: dict[str, Any]) -> dict[str, Any]:
        if not tasks:
            tasks.append(asyncio.create_task(work()))
        future = asyncio.get_running_loop().create_future()
        await waiting.put((body, future))
        return await future

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {}

    uvicorn.run(app, port=port, log_level="error")


# The report


def report(name: str, load: Load) -> str:
    def percentiles(values: list[float]) -> str:
        if len(values) < 2:
            return "–"
        cuts = quantiles(values, n=100, method="inclusive")
        return f"{cuts[49] * 1000:.0f} / {cuts[98] * 1000:.0f} ms"

    flat = load.memory[len(load.memory) // 4 :] or [0.0]
    statuses = ", ".join(f"{number} × {status}" for status, number in sorted(load.statuses.items()))
    return (
        f"| {name} | {load.rate:.1f} | {percentiles(load.first)} | {percentiles(load.between)} | {statuses} | "
        f"{load.cancelled} | {len(load.wrong)} | {dict(load.errors) or 0} | {flat[0]:.0f} → {flat[-1]:.0f} MiB |"
    )


def measure(name: str, url: str, process: Any, asked: Sequence[Question], options: Any) -> Load:
    """Load a server that is warmed up with one client, and then with all; return the load of all."""
    options.pid = process.pid
    options.mixed = False
    asyncio.run(put_load(url, asked[: options.clients], min(32, options.clients), options.warm, 0.0, options))
    one = asyncio.run(put_load(url, asked, 1, options.alone, 0.0, options))
    print(report(f"{name}, one at a time", one), flush=True)
    options.mixed = True
    many = asyncio.run(put_load(url, asked, options.clients, options.seconds, options.wait, options))
    print(report(f"{name}, {options.clients} clients", many), flush=True)
    ratio = many.rate / one.rate if one.rate else float("inf")
    print(f"{name}: {ratio:.1f} times the tokens per second of one request at a time", flush=True)
    for expected, answered in many.wrong[:3]:
        print(f"  wrong: {answered!r} instead of {expected!r}", flush=True)
    many.wrong += one.wrong
    return many


def ours(asked: Sequence[Question], options: Any) -> Load:
    """Return the load of all clients on `jax-it serve`."""
    port = free_port()
    command = [
        sys.executable, "-m", "jax_it", "serve", f"--model=m={options.model}", f"--port={port}",
        f"--batch-size={options.batch_size}", f"--max-new-tokens={LONGEST_NEW}", f"--max-prompt-tokens={LONGEST}",
        "--max-queue=1000",
    ]  # fmt: skip
    options.is_ours, options.streams, options.name = True, True, "m"
    with running(command, port, options.logs / "jax-it.log", "/health") as process:
        return measure("jax-it serve", f"http://127.0.0.1:{port}", process, asked, options)


def peer(asked: Sequence[Question], options: Any, is_causal: bool) -> tuple[str, Load]:
    """Return the peer's name, and the load of all clients on it."""
    port = free_port()
    if is_causal:
        name = "transformers serve"
        command = [
            str(Path(options.peer_python).with_name("transformers")), "serve", options.model, f"--port={port}",
            "--continuous-batching", "--dtype=float32", "--device=cpu",
        ]  # fmt: skip
    else:
        name = "FastAPI and generate"
        command = [
            options.peer_python, __file__, "--model", options.model, "--data=-", f"--micro-batches={port}",
            f"--batch-size={options.batch_size}",
        ]  # fmt: skip
    options.is_ours, options.streams, options.name = False, is_causal, options.model
    with running(command, port, options.logs / "peer.log", "/health") as process:
        return name, measure(name, f"http://127.0.0.1:{port}", process, asked, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Transformers folder or a hub name")
    parser.add_argument("--data", required=True, help="JSON lines with prompt and completion, .gz or not")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--alone", type=float, default=30, help="seconds of one request at a time")
    parser.add_argument("--warm", type=float, default=20, help="seconds of load before anything is counted")
    parser.add_argument("--wait", type=float, default=10, help="mean seconds between an answer and the next request")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--peer", action="store_true", help="measure the peer too")
    parser.add_argument("--rounds", type=int, default=1, help="of jax-it and the peer, alternately")
    parser.add_argument("--peer-python", default=sys.executable, help="a Python with PyTorch")
    parser.add_argument("--logs", type=Path, default=Path("runs/bench"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--micro-batches", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.micro_batches:
        return micro_batches(options.model, options.micro_batches, options.batch_size)
    options.logs.mkdir(parents=True, exist_ok=True)

    with get_context("spawn").Pool(1) as pool:
        arguments = options.model, options.data, options.questions, options.seed
        asked = pool.apply(questions, arguments)
    print("| | tokens/s | first token p50 / p99 | per token p50 / p99 | statuses | cut | wrong | errors | memory |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)

    is_causal = True
    if options.peer:
        from transformers import AutoConfig

        is_causal = not AutoConfig.from_pretrained(options.model).is_encoder_decoder
    failed = False
    for number in range(options.rounds):
        many = ours(asked, options)
        failed |= bool(many.wrong or many.errors) or any(status >= 500 for status in many.statuses)
        if options.peer:
            name, theirs = peer(asked, options, is_causal)
            ratio = many.rate / theirs.rate if theirs.rate else float("inf")
            print(f"round {number + 1}: jax-it serve: {ratio:.2f} times the tokens per second of {name}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
