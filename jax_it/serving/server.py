"""Run the app on uvicorn until SIGTERM or Ctrl-C, after which running requests end and new ones are refused."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from jax_it import files, hosts, status
from jax_it.errors import UserError
from jax_it.serving.access_log import AccessLog
from jax_it.serving.admission import Limits, Server
from jax_it.serving.app import make_app
from jax_it.serving.engines import EngineOptions, follow
from jax_it.serving.models import load_models
from jax_it.serving.worker import Workers

KEYS_VARIABLE = "JAX_IT_API_KEYS"
HEAD_TIMEOUT = 30.0  # seconds after which a connection is closed that asks nothing


@dataclass(frozen=True)
class ServeOptions:
    """What `jax-it serve` is told. Models and adapters are (name, path); see `models.load_models`."""

    models: Sequence[tuple[str, str]]
    adapters: Sequence[tuple[str, str]] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    key_file: str | None = None
    cors_origins: Sequence[str] = ()
    batch_size: int = 32
    stream_interval: int = 1
    limits: Limits = field(default_factory=Limits)
    log_prompts: bool = False
    drain_timeout: int = 60  # seconds that running requests have after a signal


def serve(options: ServeOptions) -> None:
    """Load the models and answer requests. Returns after SIGTERM or Ctrl-C, when running requests have ended.

    Of several hosts the first one answers; the others work for it until it ends. Raises UserError for a model that
    cannot be loaded, a key file that cannot be read, or a port that is taken.
    """
    if not hosts.is_first():
        _check_models(options)
        follow(load_models(options.models, options.adapters))
        return
    keys = read_keys(options.key_file)
    with _bind(options.host, options.port) as listener:
        _check_models(options)
        models = load_models(options.models, options.adapters)
        limits = options.limits
        workers = Workers(
            models,
            EngineOptions(limits.max_new_tokens, limits.max_prompt, options.batch_size, options.stream_interval),
        )
        server = Server(models, workers, limits, keys, AccessLog(sys.stderr, options.log_prompts))
        config = uvicorn.Config(
            make_app(server, options.cors_origins), log_config=None, access_log=False, lifespan="on",
            timeout_graceful_shutdown=options.drain_timeout, timeout_keep_alive=30, http=HttpProtocol,
        )  # fmt: skip
        logging.getLogger("uvicorn").setLevel(logging.ERROR)
        host, port = listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        uvicorn_server = _Uvicorn(config, server)
        watch = threading.Thread(target=_watch, args=(workers, uvicorn_server, f"{', '.join(models)} at {url}"))
        watch.daemon = True
        watch.start()
        with status.activity(lambda: ""):  # the access log says what happens
            uvicorn_server.run(sockets=[listener])
    if workers.failure is not None:
        raise workers.failure
    workers.engines.end()


def _check_models(options: ServeOptions) -> None:
    """Raise UserError on a host that is to serve other models than the first one; all hosts must call this."""
    mine = ", ".join(f"{name}={path}" if name else path for name, path in (*options.models, *options.adapters))
    of_first = hosts.from_first(lambda: mine)
    if mine != of_first:
        raise UserError(f"this host is to serve {mine}, the first one {of_first}; start the same command on all hosts")


def read_keys(file: str | None) -> list[str]:
    """Return the keys of a file, one a line, and of the environment variable JAX_IT_API_KEYS, separated by commas.

    Raises UserError for a file that cannot be read or has no key.
    """
    keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",")]
    if file is not None:
        try:
            lines = [line.strip() for line in files.read_text(Path(file).expanduser()).splitlines()]
        except (OSError, ValueError) as error:
            raise UserError(f"--api-key-file {file}: it cannot be read: {error}") from None
        if not any(lines):
            raise UserError(f"--api-key-file {file}: it has no key; write one on a line")
        keys += lines
    return [key for key in keys if key]


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host} port {port}: {reason}; choose another --host or --port") from None
    return listener


def _watch(workers: Workers, server: "_Uvicorn", what: str) -> None:
    """Say when requests are answered, and end the server when the engine of a model has failed."""
    began, is_ready = time.monotonic(), False
    while workers.failure is None:
        time.sleep(0.05)
        if workers.is_ready and not is_ready:
            is_ready = True
            seconds = time.monotonic() - began
            print(f"jax-it serve: {what} (compiled in {seconds:.0f} s)", file=sys.stderr, flush=True)
    if failure := workers.engines.failure:
        workers.fail(failure)
    server.should_exit = True


class HttpProtocol(H11Protocol):
    """uvicorn's protocol, which would wait for a request for ever."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request(self.cycle)

    def on_response_complete(self) -> None:
        cycle = self.cycle
        super().on_response_complete()  # which begins with the next request, if that is here already
        self._expect_request(cycle)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._deadline:
            self._deadline.cancel()

    def _expect_request(self, last: object) -> None:
        """Close the connection if no request comes after the last one in time, whatever else comes."""

        def close() -> None:
            if self.cycle is last:
                self.transport.close()

        if self._deadline:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(HEAD_TIMEOUT, close)


class _Uvicorn(uvicorn.Server):
    """uvicorn, which after a signal would repeat it, so that the process does not end with 0."""

    def __init__(self, config: uvicorn.Config, server: Server):
        super().__init__(config)
        self._server = server

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain at the first SIGTERM or Ctrl-C, and end at once at the second Ctrl-C."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def receive(number: int, frame: object) -> None:
            self._server.is_draining = True
            self.handle_exit(number, None)

        before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
