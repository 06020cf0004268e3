"""Served texts are those of Transformers' `generate` for each request alone, whatever arrives beside it.

Tiny models of five families, and real weights:

    JAX_IT_SMOLLM2=FOLDER make parity PYTEST_ARGS="-k served_by_smollm2 -s"
"""

import asyncio
import dataclasses
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from jax_it.data import chat
from jax_it.data import tokenizer_files as tokenizers
from jax_it.serving.admission import Limits
from jax_it.serving.engines import EngineOptions
from jax_it.serving.models import load_models
from jax_it.serving.worker import Workers
from tests.data.chat_tokenizers import TEXTS, checkpoint
from tests.parity import cases, pytorch
from tests.serving.conftest import Served, events, listening  # noqa: F401

pytestmark = [pytest.mark.parity, pytest.mark.slow]

SMOLLM2 = os.environ.get("JAX_IT_SMOLLM2", "")
TOKENIZERS = {"t5_1_1": None, "mt5": None, "llama3": "llama3", "qwen3": "qwen3", "gemma2": "gemma"}
PATH = "/v1/completions"
SECONDS = 0.05  # between two requests, on average
# What requests ask, as fields of the API and as settings of `generate`.
WAYS: tuple[tuple[Mapping[str, Any], Mapping[str, Any]], ...] = (
    ({}, {}),
    ({}, {}),
    ({"repetition_penalty": 1.3, "min_tokens": 3}, {"repetition_penalty": 1.3, "min_new_tokens": 3}),
    ({"use_beam_search": True, "best_of": 3}, {"num_beams": 3}),
    (
        {"use_beam_search": True, "best_of": 2, "length_penalty": 2.0, "n": 2},
        {"num_beams": 2, "length_penalty": 2.0, "num_return_sequences": 2},
    ),
)
TIE = 1e-4  # of logits in float64 that float32 may put in either order


@dataclass
class Peer:
    """Transformers' model and tokenizer of a folder."""

    folder: Path

    def __post_init__(self) -> None:
        import transformers

        self.model = pytorch.open_folder(self.folder)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder)
        self.ends = sorted({*pytorch._ends(self.model), *chat.ends(tokenizers.load(str(self.folder)))})
        self._found: dict[str, list[list[int]]] = {}

    def tokens(self, prompt: str, max_new_tokens: int, **settings: Any) -> list[list[int]]:
        """The new tokens of each text, without the end token."""
        import torch

        key = json.dumps([prompt, max_new_tokens, settings])
        if key not in self._found:
            inputs = self.tokenizer(prompt, return_tensors="pt")
            made = self.model.generate(
                input_ids=inputs.input_ids, attention_mask=torch.ones_like(inputs.input_ids), do_sample=False,
                max_new_tokens=max_new_tokens, eos_token_id=self.ends, pad_token_id=0, **settings,
            )  # fmt: skip
            start = 1 if self.model.config.is_encoder_decoder else inputs.input_ids.shape[1]
            texts = [pytorch._until_end(text, self.ends) for text in made[:, start:].tolist()]
            self._found[key] = [[token for token in text if token not in self.ends] for text in texts]
        return self._found[key]

    def text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def lead(self, prompt: str, tokens: list[int]) -> float:
        """How near in float64 the two likeliest tokens are where they are nearest, in a greedy text."""
        import torch

        model = self.model.double()
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            if model.config.is_encoder_decoder:
                start = model.config.decoder_start_token_id
                logits = model(input_ids=ids, decoder_input_ids=torch.tensor([[start, *tokens]])).logits[0]
            else:
                logits = model(input_ids=torch.cat([ids, torch.tensor([tokens]).long()], 1)).logits[
                    0, ids.shape[1] - 1 :
                ]
        self.model = model.float()
        best, second = logits.topk(2).values.unbind(-1)
        return (best - second).min().item()


@dataclass(frozen=True)
class Job:
    """A request and its texts."""

    body: Mapping[str, Any]
    texts: list[str]
    streams: bool = False
    cut: int | None = None  # the number of parts of its stream after which the client leaves
    is_greedy: bool = False


def write_family(name: str, folder: Path) -> Path:
    """Numpy's weights of a family, and a tokenizer that was trained here."""
    kind = TOKENIZERS[name]
    tokenizer = tokenizers.train(TEXTS, 300) if kind is None else checkpoint(kind)
    case = cases.BY_NAME[name]
    values = {**case.values, "vocab_size": tokenizer.size, "eos_token_id": tokenizer.end}
    if "max_position_embeddings" in values:
        values["max_position_embeddings"] = 256
    cases.write(dataclasses.replace(case, values=values), folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture
def serve() -> Iterator[Any]:
    started: list[Workers] = []

    def start(folder: Path, longest: int, batch_size: int) -> Served:
        models = load_models([("m", str(folder))], [])
        limits = Limits(max_new_tokens=longest, max_prompt=128, max_queue=1000, timeout=900.0)
        workers = Workers(models, EngineOptions(longest, 128, batch_size))
        started.append(workers)
        workers.start()
        while not workers.is_ready:
            assert workers.failure is None
            time.sleep(0.05)
        return Served(workers, models, limits)

    yield start
    for workers in started:
        workers.stop()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_served_by_tiny_models_are_those_of_transformers(name, tmp_path, serve, listening):  # noqa: F811
    folder = write_family(name, tmp_path / name)
    seen = asyncio.run(load(listening(serve(folder, 24, 4)), folder, [1, 5, 12, 24], 100))
    assert seen["ties"] <= 1
    assert min(seen[kind] for kind in ("cancelled", "sampled", "streamed", "beams", "greedy", "penalized")) >= 5


@pytest.mark.skipif(not SMOLLM2, reason="JAX_IT_SMOLLM2 names no folder that holds SmolLM2-135M")
def test_texts_served_by_smollm2_are_those_of_transformers(serve, listening):  # noqa: F811
    number, folder = int(os.environ.get("JAX_IT_REQUESTS", "100")), Path(SMOLLM2)
    asyncio.run(load(listening(serve(folder, 24, 8)), folder, [1, 6, 12, 24], number))


async def load(url: str, folder: Path, lengths: list[int], number: int) -> Counter[str]:
    """Requests of all kinds at random times, each compared; counts them by kind."""
    rng, seen, peer, words = random.Random(0), Counter[str](), Peer(folder), " ".join(TEXTS).split()
    starts = [rng.randrange(len(words)) for _ in range(12)]
    prompts = [" ".join(words[at : at + rng.choice((1, 2, 5, 9, 20))]) for at in starts]

    async def ask(client: httpx.AsyncClient, body: Mapping[str, Any]) -> list[str]:
        response = await client.post(PATH, json=body)
        assert response.status_code == 200, response.text
        return [choice["text"] for choice in response.json()["choices"]]

    async def streamed(client: httpx.AsyncClient, body: Mapping[str, Any], parts: int | None) -> list[str]:
        """The texts of a stream, or of its first parts, after which it is cut."""
        texts = [""] * body.get("n", 1)
        async with client.stream("POST", PATH, json=body | {"stream": True}) as response:
            async for line in response.aiter_lines():
                for event in events(line):
                    if event == "[DONE]":
                        return texts
                    texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
                    parts = parts and parts - 1
                if parts == 0:
                    return texts
        raise AssertionError("a stream without an end")

    async def one(client: httpx.AsyncClient, job: Job, wait: float) -> None:
        await asyncio.sleep(wait)
        parts = await (streamed(client, job.body, job.cut) if job.streams else ask(client, job.body))
        texts = job.texts
        if job.cut:
            texts = [text[: len(part)] for text, part in zip(texts, parts, strict=True)]
        if parts != texts:
            assert job.is_greedy, (job, parts)
            lead = peer.lead(job.body["prompt"], peer.tokens(job.body["prompt"], job.body["max_tokens"])[0])
            assert lead < TIE, (job, parts, lead)
            seen["ties"] += 1

    async with httpx.AsyncClient(base_url=url, timeout=900) as client:
        alone = []  # sampled texts, of one request after the other
        for seed in range(4):
            body = {
                "prompt": rng.choice(prompts), "max_tokens": max(lengths), "seed": seed, "n": 1 + seed % 2,
                "temperature": rng.choice([0.7, 1.3]), "top_p": rng.choice([1.0, 0.9]),
            }  # fmt: skip
            alone.append(Job(body, await ask(client, body)))
        jobs = []
        for _ in range(number):
            kind, max_tokens = rng.random(), rng.choice(lengths)
            if kind < 0.15:
                seen["sampled"] += 1
                jobs.append(dataclasses.replace(rng.choice(alone), streams=rng.random() < 0.5))
                continue
            prompt, (fields, settings) = rng.choice(prompts), rng.choice(WAYS)
            max_tokens = max(max_tokens, fields.get("min_tokens", 0))
            texts = [peer.text(tokens) for tokens in peer.tokens(prompt, max_tokens, **settings)]
            beams = "num_beams" in settings
            cut = rng.randint(1, 3) if kind > 0.85 and not beams else None
            seen["cancelled" if cut else "streamed" if kind > 0.5 else "whole"] += 1
            seen["beams" if beams else "penalized" if settings else "greedy"] += 1
            body = {"prompt": prompt, "max_tokens": max_tokens, **fields}
            jobs.append(Job(body, texts, kind > 0.5, cut, not settings))
        await asyncio.gather(*(one(client, job, rng.random() * number * SECONDS) for job in jobs))
    print(dict(seen))
    return seen
