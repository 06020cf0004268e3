"""Connections that are slow, half closed or cut: none is kept for ever, and others are answered beside them."""

import asyncio
import dataclasses
import json
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest

from tests.serving.conftest import LIMITS

PATH = "/v1/completions"
BODY = {"prompt": "Say hello"}


def head(length: int) -> bytes:
    lines = f"POST {PATH} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {length}"
    return "\r\n".join([*lines, "", ""]).encode()


def request(**fields) -> bytes:
    body = json.dumps(BODY | fields).encode()
    return head(len(body)) + body


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=30)


def read_all(connection: socket.socket) -> bytes:
    """All until the server closes."""
    found = b""
    while part := connection.recv(1 << 16):
        found += part
    return found


def drip(connection: socket.socket, data: bytes, pause: float = 0.05) -> None:
    """Sends bytes one by one until the server closes."""
    for byte in (data * 60)[:60]:
        try:
            connection.send(bytes([byte]))
        except OSError:
            return
        time.sleep(pause)
    raise AssertionError("the server has waited for all of it")


@pytest.fixture
def quick(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr("jax_it.serving.server.HEAD_TIMEOUT", 0.3)
    yield


def is_answered(url: str) -> bool:
    return httpx.post(url + PATH, json=BODY | {"max_tokens": 2}, timeout=60).status_code == 200


def test_a_head_that_drips_is_not_waited_for(served, listening, quick):
    url = listening(served)
    with connect(url) as first, connect(url) as second:
        assert read_all(first) == b"", "a connection that asks nothing"
        drip(second, b"POST /v1/completions HTTP/1.1\r\nX-Slow: ")
    with connect(url) as later:
        later.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert later.recv(1000).startswith(b"HTTP/1.1 200")
        drip(later, b"GET /health HTTP/1.1\r\nX-Slow: ")
    assert is_answered(url)


def test_a_body_that_drips_is_refused_and_what_follows_it_is_not_read_for_ever(served, listening, quick):
    url = listening(served.with_options(dataclasses.replace(LIMITS, body_timeout=0.3)))
    with connect(url) as dripping:
        dripping.sendall(head(10_000) + b'{"prompt": "')
        began = time.monotonic()
        assert dripping.recv(1000).startswith(b"HTTP/1.1 408") and time.monotonic() < began + 10
        drip(dripping, b"x")
    with connect(url) as large:
        large.sendall(head(1 << 40))
        large.sendall(b" " * (5 << 20))
        assert large.recv(1000).startswith(b"HTTP/1.1 413")
        drip(large, b" ")
    assert is_answered(url)


def test_a_client_that_has_closed_its_side_for_writing_is_a_client_that_has_gone(served, listening):
    """As uvicorn takes it; what matters is that nothing runs on."""
    url = listening(served)
    for stream in (True, False):
        with connect(url) as half:
            half.sendall(request(stream=stream))
            half.shutdown(socket.SHUT_WR)
            read_all(half)
    with connect(url) as half:
        half.sendall(head(100) + b'{"prompt')
        half.shutdown(socket.SHUT_WR)
        assert b" 200 " not in read_all(half)
    assert_nothing_runs(served)
    assert is_answered(url)


def test_clients_that_vanish_in_the_middle_of_a_stream_leave_nothing(served, listening, slow_steps):
    url = listening(served)
    for _ in range(10):
        vanishing = connect(url)
        vanishing.sendall(request(stream=True))
        assert vanishing.recv(1)
        vanishing.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset instead of an end
        vanishing.close()
    assert_nothing_runs(served)
    assert is_answered(url)


def test_a_client_that_reads_nothing_holds_its_place_no_longer_than_a_request_may_take(served):
    limited = served.with_options(dataclasses.replace(LIMITS, timeout=1.0))
    body = json.dumps(BODY | {"stream": True, "max_tokens": 2}).encode()
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": PATH, "query_string": b"", "headers": headers}

    async def receive() -> dict:
        if parts:
            return {"type": "http.request", "body": parts.pop()}
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        if message["type"] == "http.response.body":
            await asyncio.sleep(60)

    parts, began = [body], time.monotonic()
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(limited.app(scope, receive, send), 30))
    assert time.monotonic() < began + 20 and not limited.server.unfinished


def assert_nothing_runs(served) -> None:
    scheduler = served.workers._of_models["llama"].scheduler
    until = time.monotonic() + 10
    while (scheduler.has_unfinished or served.server.unfinished) and time.monotonic() < until:
        time.sleep(0.01)
    assert not scheduler.has_unfinished and not served.server.unfinished
