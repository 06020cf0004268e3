"""The texts of a request as they come from the workers, sent in parts or all at once."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from jax_it.errors import UserError
from jax_it.generation import RequestOutput
from jax_it.serving.admission import Server
from jax_it.serving.errors import ApiError
from jax_it.serving.metrics import RequestTimes
from jax_it.serving.models import ServedModel
from jax_it.serving.responses import (
    ChatResponse,
    CompletionResponse,
    Part,
    Text,
    TokenLogProb,
    prompt_log_probs,
    usage,
)
from jax_it.serving.schemas import Generation
from jax_it.serving.worker import EngineFailed, Overloaded, Prompt

KEEP_ALIVE = 15.0  # seconds without output after which a stream has a comment


class EventStream(StreamingResponse):
    """A stream whose events are closed when the client goes away, even in the middle of a send."""

    def __init__(self, events: AsyncGenerator[str, None], release: Callable[[], None], headers: dict[str, str]):
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events, self._release = events, release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            self._release()


class Parts:
    """The parts of all texts of a request, as they come from the worker."""

    def __init__(
        self, server: Server, served: ServedModel, prompts: Sequence[Prompt], body: Generation,
        echoes: Sequence[str] | None, log: dict[str, Any],
    ):  # fmt: skip
        self._server, self._served, self.prompts, self._body = server, served, prompts, body
        self._echoes, self._log = echoes, log
        # An echo without anything generated has one token all the same, which is left out.
        self._only_echo = echoes is not None and body.max_tokens == 0
        tokenizer = served.run.tokenizer
        self.texts = [
            Text(number * body.n + sample, prompt, tokenizer, prompt.logprobs is not None)
            for number, prompt in enumerate(prompts)
            for sample in range(body.n)
        ]

    @property
    def usage(self) -> dict[str, int]:
        return usage(self.prompts, self.texts)

    async def __call__(self) -> AsyncGenerator[Part | None, None]:
        """Yield parts until all texts have ended, and None when none has come for a while.

        The requests are dropped when it is closed. Raises ApiError for a text that has an error instead of an end.
        """
        server, echoed = self._server, set[int]()
        try:
            async with server.workers.submit(self._served.name, self.prompts) as ticket:
                times = RequestTimes(server.metrics, ticket)
                async for output in ticket.outputs(server.limits.timeout, KEEP_ALIVE):
                    if output is None:
                        yield None
                        continue
                    times.record(output)
                    if output.finish_reason == "error":
                        raise self._error_of(output.request_id)
                    text = self.texts[output.request_id * self._body.n + output.sample]
                    part = text.add(output)
                    if self._echoes is not None and text.index not in echoed:
                        echoed.add(text.index)
                        part = self._with_echo(part, output)
                    elif self._only_echo:
                        part = part._replace(text="", log_probs=[])
                    yield part
                times.end()
                server.seconds_of_request += 0.1 * (time.monotonic() - ticket.arrived - server.seconds_of_request)
        except TimeoutError:
            raise ApiError(
                503, f"the request took more than {server.limits.timeout:g} seconds", code="timeout"
            ) from None
        except EngineFailed as error:
            raise ApiError(500, f"the engine failed with this request: {error}") from None
        except Overloaded as error:
            raise ApiError(503, str(error), retry_after=10) from None
        except UserError as error:
            raise ApiError(400, str(error)) from None
        finally:
            reasons = [text.finish_reason for text in self.texts]
            self._log |= self.usage | {"finish_reason": reasons[0] if len(reasons) == 1 else reasons}

    def _error_of(self, number: int) -> ApiError:
        """Return why a text has an error instead of an end."""
        constraint = self.prompts[number].constraint
        if constraint is not None and constraint.error:
            return ApiError(400, f"the JSON schema is too much for this server: {constraint.error}", "response_format")
        return ApiError(500, "the model's logits are not finite, so there is no text: its weights are broken")

    def _with_echo(self, part: Part, output: RequestOutput) -> Part:
        assert self._echoes is not None
        prompt = self.prompts[output.request_id]
        before: list[TokenLogProb] = []
        if prompt.prompt_logprobs is not None:
            tokenizer = self._served.run.tokenizer
            before = prompt_log_probs(tokenizer, prompt.tokens, output.prompt_log_probs, prompt.prompt_logprobs)
        if self._only_echo:
            self.texts[part.choice].tokens = 0
            part = part._replace(text="", log_probs=[], finish_reason=part.finish_reason and "length")
        return part._replace(text=self._echoes[output.request_id] + part.text, log_probs=before + part.log_probs)


async def whole(parts: Parts, response: CompletionResponse | ChatResponse) -> dict[str, Any]:
    found: dict[int, list[Part]] = {text.index: [] for text in parts.texts}
    async for part in parts():
        if part is not None:
            found[part.choice].append(part)
    return response.whole(found, parts.usage)


async def events(
    parts: Parts, response: CompletionResponse | ChatResponse, include_usage: bool
) -> AsyncGenerator[str, None]:
    """Yield server-sent events; comments keep the connection alive while there is nothing to say."""
    begun = set[int]()
    try:
        async with aclosing(parts()) as found:
            async for part in found:
                if part is None:
                    yield ": keep-alive\n\n"
                    continue
                chunks = [] if part.choice in begun else response.first(part.choice)
                begun.add(part.choice)
                for chunk in (*chunks, *response.chunks(part)):
                    yield _event(chunk | ({"usage": None} if include_usage else {}))
        if include_usage:
            yield _event(response.usage_chunk(parts.usage))
    except ApiError as error:
        yield _event(error.body)
        return
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def unless_disconnected(request: Request, work: Any) -> Any:
    """Return what `work` gives, and cancel it if the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait([working, waiting], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the client has gone away")
        return working.result()
    finally:
        for task in (working, waiting):
            task.cancel()
        await asyncio.wait([working, waiting])
