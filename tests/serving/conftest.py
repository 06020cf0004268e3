"""Servers of tiny models: the app in this process, spoken to through ASGI, each compiled once for all of its tests."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from jax_it.data import tokenizer_files as tokenizers
from jax_it.serving.app import Limits, Server, make_app
from jax_it.serving.models import load_models
from jax_it.serving.worker import EngineOptions, Workers
from tests.data.chat_tokenizers import TEXTS, checkpoint
from tests.harness.conftest import CAUSAL, T5, write

LIMITS = Limits(max_new_tokens=24, max_prompt=72, max_queue=64, max_texts=16, timeout=120.0)


class Served:
    """A running app; `client()` gives a client for it."""

    def __init__(self, folders: dict[str, Path], limits: Limits = LIMITS, keys=(), batch_size=4, cors=(), log=None):
        self.models = load_models([(name, str(folder)) for name, folder in folders.items()], [])
        self.workers = Workers(self.models, EngineOptions(limits.max_new_tokens, limits.max_prompt, batch_size))
        self.server = Server(self.models, self.workers, limits, keys, log)
        self.app = make_app(self.server, cors)

    def start(self) -> "Served":
        self.workers.start()
        return self

    def client(self, **headers: str) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app)
        return httpx.AsyncClient(transport=transport, base_url="http://served", headers=headers, timeout=120)

    def post(self, path: str, body, **headers) -> httpx.Response:
        async def run():
            async with self.client(**headers) as client:
                if isinstance(body, bytes):
                    return await client.post(path, content=body)
                return await client.post(path, json=body)

        return asyncio.run(run())

    def get(self, path: str, **headers) -> httpx.Response:
        async def run():
            async with self.client(**headers) as client:
                return await client.get(path)

        return asyncio.run(run())

    def chat(self, text: str, **fields) -> httpx.Response:
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **fields})

    def complete(self, prompt, **fields) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": prompt, **fields})

    def refused(self, path: str, body, status: int = 400) -> dict:
        """The error of a request."""
        response = self.post(path, body)
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"} and error["message"]
        return error


def events(text: str) -> list:
    """What a stream says: objects, and "[DONE]"."""
    found = []
    for event in text.split("\n\n"):
        if event and not event.startswith(":"):
            assert event.startswith("data: ") and "\n" not in event
            data = event.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
    return found


@pytest.fixture(scope="session")
def served_folders(tmp_path_factory) -> dict[str, Path]:
    """A chat model that is a Llama, and a T5 without a chat template."""
    root = tmp_path_factory.mktemp("served")
    return {
        "llama": write(root / "llama", CAUSAL, checkpoint("smollm2")),
        "t5": write(root / "t5", T5, tokenizers.train(TEXTS, 300)),
    }


@pytest.fixture(scope="session")
def served(served_folders) -> Iterator[Served]:
    served = Served(served_folders).start()
    yield served
    served.workers.stop()
