"""A model behind an OpenAI-style HTTP endpoint: asynchronous, a bounded number of requests at a time, with retries."""

import asyncio
import email.utils
import random
import time
from collections.abc import Sequence
from typing import Any

from jax_it.curation.build.requests import Journal, Reply, Request, Usage, key_of
from jax_it.curation.stage import require
from jax_it.errors import UserError, first_line, shorten
from jax_it.status import Bar

ATTEMPTS = 8  # of a request
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between two of them: it doubles each time
FATAL = {401: "check the API key", 402: "check the account", 403: "check the API key", 404: "check URL and model"}
_RETRIED = {408, 409, 425, 429}  # and 500 to 599


class _Retry(Exception):
    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait  # seconds that the endpoint asks for


class Endpoint:
    """A `Generator` over HTTP; a context manager.

    Requests that the journal answers are not sent. A request is sent again, after a growing wait, when the endpoint is
    busy (429), fails (5xx), cannot be reached, takes too long or answers with broken JSON. One that the endpoint
    refuses (other 4xx) becomes a `Reply` with the error; UserError is raised where it has refused all so far.
    """

    def __init__(
        self,
        url: str,
        model: str,
        journal: Journal,
        usage: Usage,
        api_key: str = "",
        concurrency: int = 16,
        timeout: float = 600.0,
    ):
        self._http = require("httpx2", "--endpoint")
        if not url.startswith(("http://", "https://")):
            raise UserError(f"--endpoint {shorten(url)}: not a URL; give one such as http://localhost:8000/v1")
        self.name = model
        self.usage = usage
        self._url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self._journal, self._concurrency = journal, concurrency
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = timeout
        self._runner: asyncio.Runner | None = None
        self._client: Any = None

    def __enter__(self) -> "Endpoint":
        self._runner = asyncio.Runner()
        limits = self._http.Limits(max_connections=self._concurrency, max_keepalive_connections=self._concurrency)
        self._client = self._http.AsyncClient(headers=self._headers, timeout=self._timeout, limits=limits)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._runner is not None
        self._runner.run(self._client.aclose())
        self._runner.close()

    def __call__(self, requests: Sequence[Request]) -> list[Reply]:
        assert self._runner is not None
        keys = [key_of(self.name, request) for request in requests]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if self._journal.get(key) is None}
        self.usage.from_journal += len(set(keys)) - len(missing)
        if missing:
            began = time.monotonic()
            with Bar("asking", len(missing), "requests") as bar:
                self._runner.run(self._ask_all(missing, bar))
            self.usage.seconds += time.monotonic() - began
        found = [reply for key in keys if (reply := self._journal.get(key)) is not None]
        if self.usage.requests == self.usage.refused > 0 and not self.usage.from_journal:
            raise UserError(
                f"--endpoint {self._url}: all {self.usage.refused} requests were refused, the first with: "
                f"{found[0].error}; change the command or the endpoint's limits"
            )
        return found

    async def _ask_all(self, missing: dict[str, Request], bar: Bar) -> None:
        waiting = iter(missing.items())

        async def work() -> None:
            for key, request in waiting:
                reply = await self._ask(key, request)
                self._journal.put(key, reply)
                self.usage.add(reply)
                bar.update()

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(self._concurrency, len(missing))):
                    tasks.create_task(work())
        except ExceptionGroup as group:  # the first error ends the other requests
            raise group.exceptions[0] from None

    async def _ask(self, key: str, request: Request) -> Reply:
        jitter = random.Random(key)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self._send(key, request)
            except _Retry as error:
                reason = str(error)
                if attempt < ATTEMPTS:
                    self.usage.retries += 1
                    self.usage.retried[reason] = self.usage.retried.get(reason, 0) + 1
                    wait = FIRST_WAIT * 2 ** (attempt - 1) * (0.5 + jitter.random())
                    await asyncio.sleep(min(max(wait, error.wait), LONGEST_WAIT))
        raise UserError(
            f"--endpoint {self._url}: {ATTEMPTS} attempts failed, the last one with: {reason}; answers so far are "
            "kept: run the same command again to continue"
        )

    async def _send(self, key: str, request: Request) -> Reply:
        body: dict[str, Any] = {
            "model": self.name,
            "messages": [{"role": role, "content": text} for role, text in request.messages],
            "max_tokens": request.max_new_tokens,
            "temperature": request.temperature,
        }
        if request.temperature:
            body |= {"top_p": request.top_p, "seed": request.seed}
        if request.stop:
            body["stop"] = list(request.stop)
        try:
            # Endpoints that know this header answer a request that is sent twice only once.
            response = await self._client.post(self._url, json=body, headers={"Idempotency-Key": key})
        except self._http.TimeoutException:
            raise _Retry("no answer in time") from None
        except self._http.HTTPError as error:
            raise _Retry(f"cannot be reached ({shorten(first_line(error), 100)})") from None
        status = response.status_code
        if status in FATAL:
            what = shorten(_error_of(response), 300)
            raise UserError(f"--endpoint {self._url}: status {status}: {what}; {FATAL[status]}")
        if status in _RETRIED or status >= 500:
            raise _Retry(f"status {status}", _retry_after(response))
        if status >= 400:
            return Reply("", error=f"status {status}: {shorten(_error_of(response), 300)}")
        return _reply(response)


def _reply(response: Any) -> Reply:
    try:
        answer = response.json()
        choice = answer["choices"][0]
        text = choice["message"]["content"]
        usage = answer.get("usage") or {}
        if not isinstance(text, str | None):
            raise TypeError
        counts = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        return Reply(text or "", choice.get("finish_reason") != "length", *counts)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise _Retry("an answer that is not a completion") from None


def _error_of(response: Any) -> str:
    try:
        error = response.json()
        error = error.get("error", error)
        return str(error.get("message", error)) if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError):
        return str(response.text) or "no reason given"


def _retry_after(response: Any) -> float:
    """Return how many seconds the endpoint asks to wait: the header holds a number, or a date."""
    value = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
