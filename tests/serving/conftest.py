"""Servers of tiny models: the app in this process, spoken to through ASGI, each compiled once for all of its tests."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
import uvicorn

from jax_it.data import tokenizer_files as tokenizers
from jax_it.serving.admission import Limits, Server
from jax_it.serving.app import make_app
from jax_it.serving.engines import EngineOptions
from jax_it.serving.models import load_models
from jax_it.serving.server import HttpProtocol
from jax_it.serving.worker import Worker, Workers
from tests.data.chat_tokenizers import TEXTS, checkpoint
from tests.harness.conftest import CAUSAL, T5, write

TOOLS = "{% if tools %}{% for tool in tools %}{{ tool.function.name }} {% endfor %}{% endif %}"
LIMITS = Limits(max_new_tokens=24, max_prompt=128, max_queue=64, max_texts=16, timeout=120.0)


class Served:
    """A running app; `client()` gives a client for it."""

    def __init__(self, workers: Workers, models, limits: Limits = LIMITS, keys=(), cors=(), log=None):
        self.workers, self.models = workers, models
        self.server = Server(models, workers, limits, keys, log)
        self.app = make_app(self.server, cors)

    def with_options(self, limits: Limits = LIMITS, **options) -> "Served":
        """Another app over the same engines."""
        return Served(self.workers, self.models, limits, **options)

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
    template = TOOLS + checkpoint("smollm2").chat_template
    return {
        "llama": write(
            root / "llama",
            CAUSAL | {"max_position_embeddings": 192},
            checkpoint("smollm2").with_chat_template(template, "the test"),
        ),
        "t5": write(root / "t5", T5, tokenizers.train(TEXTS, 300)),
    }


@pytest.fixture(scope="session")
def served(served_folders) -> Iterator[Served]:
    models = load_models([(name, str(folder)) for name, folder in served_folders.items()], [])
    workers = Workers(models, EngineOptions(LIMITS.max_new_tokens, LIMITS.max_prompt, batch_size=4))
    workers.start()
    while not workers.is_ready:
        assert workers.failure is None
        time.sleep(0.05)
    yield Served(workers, models)
    workers.stop()


@pytest.fixture
def slow_steps(monkeypatch):
    """A step takes a twentieth of a second, so that a text takes more than one."""
    step = Worker._step

    def slowly(self):
        time.sleep(0.05)
        return step(self)

    monkeypatch.setattr(Worker, "_step", slowly)


@pytest.fixture
def listening() -> Iterator[Callable[[Served], str]]:
    """Listens on a port of this machine; gives the URL."""
    servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    def listen(served: Served) -> str:
        options = {"port": 0, "lifespan": "off", "log_config": None, "access_log": False, "http": HttpProtocol}
        server = uvicorn.Server(uvicorn.Config(served.app, **options))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        servers.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    yield listen
    for server, thread in servers:
        server.should_exit = True
        thread.join(10)
