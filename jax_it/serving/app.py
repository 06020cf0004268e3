"""The HTTP interface: routes, keys, limits and errors."""

import asyncio
import hmac
import importlib.metadata
import json
import math
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from jax_it.errors import UserError
from jax_it.generation.requests import Sampling, check
from jax_it.serving import page, prompt_templates, reference, tools
from jax_it.serving import prompts as prompt_encoding
from jax_it.serving.access_log import AccessLog
from jax_it.serving.constraints import Constraints
from jax_it.serving.errors import ApiError
from jax_it.serving.metrics import Metrics, RequestTimes
from jax_it.serving.models import ServedModel
from jax_it.serving.responses import (
    ChatResponse,
    CompletionResponse,
    Part,
    Text,
    TokenLogProb,
    prompt_log_probs,
    usage,
)  # fmt: skip
from jax_it.serving.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Generation,
    RenderRequest,
    TokenizeRequest,
)
from jax_it.serving.worker import EngineFailed, Overloaded, Prompt, Workers

OPEN_PATHS = ("/health", *page.FILES)  # without a key
KEEP_ALIVE = 15.0  # seconds without output after which a stream has a comment

STATUSES: dict[int | str, str] = {
    400: "A field is wrong, unknown or over a limit.",
    401: "The key is missing or wrong.",
    404: "There is no such model.",
    413: "The body is too large.",
    429: "The queue is full; `Retry-After` says how many seconds to wait.",
    503: "The server is shutting down, or the request took too long.",
}


@dataclass(frozen=True)
class Limits:
    """What a server refuses."""

    max_new_tokens: int = 512  # of a text
    max_prompt: int = 1024  # tokens
    max_queue: int = 256  # texts that wait
    max_texts: int = 128  # of one request: prompts times n
    max_beams: int = 16
    max_body: int = 4 << 20  # bytes
    timeout: float = 600.0  # seconds that a request may take
    body_timeout: float = 30.0  # seconds in which its body has to arrive


class Server:
    """The state behind the routes."""

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        workers: Workers,
        limits: Limits,
        keys: Sequence[str] = (),
        log: AccessLog | None = None,
    ):
        self.models, self.workers, self.limits, self.keys = models, workers, limits, [key.encode() for key in keys]
        self.log = log or AccessLog(None)
        self.metrics = Metrics(workers)
        self.is_draining = False
        self.unfinished = 0  # texts that wait or run
        # One thread: tokenizers take turns, and a long prompt does not stall the event loop.
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._constraints = {name: Constraints(model.run) for name, model in models.items()}
        self._seconds_per_text = 1.0  # a running mean

    def model(self, name: str | None) -> ServedModel:
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            known = ", ".join(self.models)
            raise ApiError(404, f"there is no model {name!r} here; there are: {known}", "model", "model_not_found")
        return self.models[name]

    async def in_encoder(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._encoder, function, *arguments)

    def check_works(self) -> None:
        """Raise ApiError where the server answers no requests any more."""
        if self.is_draining:
            raise ApiError(503, "the server is shutting down", retry_after=10)
        if self.workers.failure is not None:
            raise ApiError(503, "the engine has failed; restart the server")

    def reserve(self, texts: int) -> Callable[[], None]:
        """Count a request's texts as unfinished, and return what ends that. Raises ApiError where too many wait."""
        self.check_works()
        waiting = self.unfinished + texts - self.workers.options.batch_size
        if waiting > self.limits.max_queue:
            seconds = math.ceil(self._seconds_per_text * waiting / max(1, self.workers.options.batch_size))
            raise ApiError(
                429,
                f"{self.unfinished} texts are under way, and {self.limits.max_queue} at most may wait",
                code="queue_full",
                retry_after=min(max(1, seconds), 120),
            )
        self.unfinished += texts
        left = [texts]

        def release() -> None:
            self.unfinished -= left.pop() if left else 0

        return release

    def count_texts(self, texts: int, seconds: float) -> None:
        self._seconds_per_text += 0.1 * (seconds - self._seconds_per_text)

    def check_length(self, served: ServedModel, prompt: int, new: int, field: str) -> None:
        """Raise ApiError for a prompt of so many tokens that is too long, alone or with the new ones."""
        what, most = f"the prompt has {prompt} tokens", self.limits.max_prompt
        if prompt > most:
            raise ApiError(
                400, f"{what}; this server takes {most} (--max-prompt-tokens)", field, "context_length_exceeded"
            )
        if served.max_length and prompt + new > served.max_length:
            message = f"{what}, and with {new} new ones it is longer than the model's {served.max_length}"
            raise ApiError(400, message, field, "context_length_exceeded")

    def max_length(self, served: ServedModel) -> int:
        """Return the most tokens of a prompt and its text together."""
        most = self.limits.max_prompt + self.limits.max_new_tokens
        return min(most, served.max_length or most)

    def prompts(
        self, served: ServedModel, encoded: Sequence[list[int]], request: Generation, max_tokens: int
    ) -> list[Prompt]:
        """Return what the worker takes. Raises ApiError for a request over the limits, or with settings that clash."""
        limits, is_chat = self.limits, isinstance(request, ChatRequest)
        if len(encoded) * request.n > limits.max_texts:
            raise ApiError(400, f"{len(encoded) * request.n} texts are more than {limits.max_texts}", "n")
        field = "max_completion_tokens" if is_chat and request.max_tokens is None else "max_tokens"
        if max_tokens > limits.max_new_tokens:
            raise ApiError(
                400,
                f"{field} {max_tokens} is more than this server's {limits.max_new_tokens} (--max-new-tokens)",
                field,
            )
        for tokens in encoded:
            self.check_length(served, len(tokens), max_tokens, "messages" if is_chat else "prompt")
        sampling = self._sampling(served, request, max_tokens)
        logprobs = prompt_logprobs = None
        if isinstance(request, CompletionRequest):
            logprobs = request.logprobs
            if request.echo and not served.is_causal:
                raise ApiError(
                    400,
                    f"{served.name} is an encoder-decoder, whose prompt has no log-probabilities: leave echo out; "
                    "score its answers with `jax-it eval`, or with the harness: lm_eval --model jax_it",
                    "echo",
                )
            prompt_logprobs = request.logprobs if request.echo else None
        elif isinstance(request, ChatRequest) and request.logprobs:
            logprobs = request.top_logprobs or 0
        constraint = self._constraint(served, request)
        if sampling.num_beams > 1 and (constraint or request.stop_strings or logprobs):
            raise ApiError(
                400, "beam search does not go with stop, logprobs, tool_choice or response_format", "use_beam_search"
            )
        return [
            Prompt(tokens, max(1, max_tokens), sampling, request.stop_strings, i, logprobs, prompt_logprobs, constraint)
            for i, tokens in enumerate(encoded)
        ]

    def _sampling(self, served: ServedModel, request: Generation, max_tokens: int) -> Sampling:
        run = served.run
        if request.use_beam_search:
            beams = request.best_of or request.n
            if not request.n <= beams <= self.limits.max_beams:
                raise ApiError(400, f"best_of {beams}: from n, {request.n}, to {self.limits.max_beams}", "best_of")
            if request.temperature:
                raise ApiError(400, "beam search does not sample; leave temperature out", "temperature")
            if beams == 1:
                raise ApiError(400, "a beam search has 2 beams or more; set best_of", "best_of")
        else:
            beams = 1
            if request.best_of not in (None, request.n):
                raise ApiError(400, "best_of is for use_beam_search", "best_of")
            if request.length_penalty != 1:
                raise ApiError(400, "length_penalty is for use_beam_search", "length_penalty")
            if request.n > 1 and not request.temperature:
                raise ApiError(
                    400, "n above 1 needs a temperature above 0, or use_beam_search: all texts would be the same", "n"
                )
        draws = request.temperature > 0
        bias = []
        for token, value in request.logit_bias.items():
            if not (token.isascii() and token.isdigit() and len(token) < 10):
                raise ApiError(400, f"logit_bias: {token!r} is not a token id", "logit_bias")
            bias.append((int(token), value))
        sampling = Sampling(
            temperature=request.temperature,
            top_k=max(0, request.top_k) if draws else 0,
            top_p=request.top_p if draws else 1.0,
            min_p=request.min_p if draws else 0.0,
            seed=(_random_seed() if request.seed is None else request.seed % (1 << 64)) if draws else 0,
            num_beams=beams,
            length_penalty=request.length_penalty,
            repetition_penalty=request.repetition_penalty,
            min_new_tokens=request.min_tokens,
            num_samples=request.n,
            frequency_penalty=request.frequency_penalty,
            presence_penalty=request.presence_penalty,
            logit_bias=tuple(bias),
            ignore_eos=request.ignore_eos,
        )
        if request.min_tokens > max_tokens:
            raise ApiError(400, f"min_tokens {request.min_tokens} is more than max_tokens {max_tokens}", "min_tokens")
        try:
            check(sampling, self.limits.max_new_tokens, run.model.config.vocab_size)
        except UserError as error:
            raise ApiError(400, str(error), str(error).split()[0].rstrip(":")) from None
        return sampling

    def _constraint(self, served: ServedModel, request: Generation) -> Any:
        schema: dict[str, Any] | None = None
        field = "response_format"
        if request.response_format and request.response_format.type != "text":
            wanted = request.response_format.json_schema
            schema = wanted.schema_ if wanted else {"type": "object"}
        if isinstance(request, ChatRequest) and (forced := tools.forced_schema(request)) is not None:
            if schema is not None:
                raise ApiError(400, "response_format does not go with a forced tool_choice", "response_format")
            schema, field = forced, "tool_choice"
        if schema is None:
            return None
        try:
            return self._constraints[served.name].of_schema(schema)
        except UserError as error:
            raise ApiError(400, str(error), field) from None


def make_app(server: Server, cors_origins: Sequence[str] = ()) -> FastAPI:
    """Return the ASGI app; the worker starts and stops with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.workers.start()
        yield
        server.workers.stop()

    app = FastAPI(
        title="jax-it serve", version=importlib.metadata.version("jax-it"), lifespan=lifespan, docs_url=None,
        redoc_url=None, max_body_size=server.limits.max_body,
        responses={status: {"description": text} for status, text in STATUSES.items()},
    )  # fmt: skip
    _add_errors(app)
    _add_generation(app, server)
    _add_tokens(app, server)
    _add_status(app, server)
    page.add_page(app)
    app.add_middleware(_Guard, server=server)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app


# Routes


def _add_generation(app: FastAPI, server: Server) -> None:
    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Generate texts that continue prompts, as they are."""
        served = server.model(body.model)
        given = body.prompt if isinstance(body.prompt, list) and not isinstance(body.prompt[0], int) else [body.prompt]
        encoded = await server.in_encoder(prompt_encoding.encode_texts, served.run, given)
        max_tokens = min(16, server.limits.max_new_tokens) if body.max_tokens is None else body.max_tokens
        if max_tokens == 0 and not body.echo:
            raise ApiError(400, "max_tokens 0 needs echo: true", "max_tokens")
        prompts = await server.in_encoder(server.prompts, served, encoded, body, max_tokens)
        response = CompletionResponse(body, served.name, request.state.id)
        echoes: list[str] | None = None
        if body.echo:
            decode = served.run.tokenizer.decode
            echoes = [text if isinstance(text, str) else decode(text) for text in given]
        return await _respond(server, request, served, prompts, body, response, echoes)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Generate the answer to a conversation, which is rendered as in training."""
        served = server.model(body.model)
        if body.tool_choice not in ("none", "auto"):
            names = [tool.function.name for tool in body.tools]
            if not names or (not isinstance(body.tool_choice, str) and body.tool_choice.function.name not in names):
                raise ApiError(400, "tool_choice asks for a function that tools does not have", "tool_choice")
        offered = [] if body.tool_choice == "none" else body.tools
        tokens = await server.in_encoder(
            prompt_encoding.encode_chat, served.run, body.messages, offered, body.chat_template_kwargs
        )
        asked = body.max_completion_tokens or body.max_tokens
        max_tokens = asked or max(1, min(server.limits.max_new_tokens, server.max_length(served) - len(tokens)))
        prompts = await server.in_encoder(server.prompts, served, [tokens], body, max_tokens)
        return await _respond(server, request, served, prompts, body, ChatResponse(body, served.name, request.state.id))


def _add_tokens(app: FastAPI, server: Server) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """Return the tokens of a text, or of a conversation as the model reads it."""
        served = server.model(body.model)
        run = served.run
        if body.messages is not None:
            arguments = run, body.messages, body.tools, body.chat_template_kwargs
            tokens = await server.in_encoder(prompt_encoding.encode_chat, *arguments)
        elif body.add_special_tokens and body.prompt:
            (tokens,) = await server.in_encoder(prompt_encoding.encode_texts, run, [body.prompt])
        else:
            (tokens,) = await server.in_encoder(run.tokenizer.encode, [body.prompt])
        found = {"count": len(tokens), "max_model_len": server.max_length(served), "tokens": tokens}
        return found | ({"token_strs": run.tokenizer.show(tokens)} if body.return_token_strs else {})

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """Return the text of tokens, special tokens included."""
        run = server.model(body.model).run
        if body.tokens and max(body.tokens) >= run.model.config.vocab_size:
            raise ApiError(400, f"the model's tokens are below {run.model.config.vocab_size}", "tokens")
        return {"prompt": await server.in_encoder(run.tokenizer.text, body.tokens)}

    @app.post("/render")
    async def render(body: RenderRequest) -> dict[str, str]:
        """Return the prompt that a template of the model's run makes of fields."""
        run = server.model(body.model).run
        return {"prompt": await server.in_encoder(prompt_templates.render, run, body.template, body.fields)}

    @app.get("/tokenizer_info")
    async def tokenizer_info(model: str | None = None) -> dict[str, Any]:
        """Describe a model's tokenizer, its special tokens and chat template."""
        served = server.model(model)
        backend = served.run.tokenizer.backend
        named = {name: getattr(backend, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        return {
            "tokenizer_class": type(backend).__name__, "vocab_size": served.run.tokenizer.size, **named,
            "chat_template": served.run.tokenizer.chat_template,
        }  # fmt: skip


def _add_status(app: FastAPI, server: Server) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the models that requests can name."""
        data = [
            {
                "id": name, "object": "model", "created": served.created, "owned_by": "jax-it", "root": served.path,
                "parent": served.parent, "max_model_len": server.max_length(served),
                "max_new_tokens": server.limits.max_new_tokens, "kind": served.run.model.kind,
                "has_chat_template": served.run.tokenizer.chat_template is not None,
                "templates": prompt_templates.describe(served.run),
            }
            for name, served in server.models.items()
        ]  # fmt: skip
        return {"object": "list", "data": data}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        """Return one of the models."""
        server.model(name)
        return next(each for each in (await models())["data"] if each["id"] == name)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Say whether requests are answered: 200 from when the engine is compiled, else 503."""
        server.check_works()
        if not server.workers.is_ready:
            raise ApiError(503, "the engine is being compiled", retry_after=5)
        return {"status": "ok"}

    @app.get("/version")
    async def version() -> dict[str, str]:
        """Return the versions of jax-it and JAX."""
        return {name: importlib.metadata.version(name) for name in ("jax-it", "jax")} | {"version": app.version}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Return metrics in Prometheus's text format, under vLLM's names."""
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(reference.page(app.openapi()))


# Generation


async def _respond(
    server: Server,
    request: Request,
    served: ServedModel,
    prompts: Sequence[Prompt],
    body: Generation,
    response: CompletionResponse | ChatResponse,
    echoes: Sequence[str] | None = None,
) -> Response:
    release = server.reserve(sum(prompt.sampling.num_samples for prompt in prompts))
    log = request.state.log
    log |= {"model": served.name, "stream": body.stream, "user": body.user or None}
    server.log.add_prompts(log, served.run.tokenizer, prompts)
    parts = _Parts(server, served, prompts, body, echoes, log)
    if body.stream:
        options = body.stream_options
        events = _events(parts, response, options is not None and options.include_usage)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return _EventStream(events, release, headers)
    try:
        return JSONResponse(await _unless_disconnected(request, _whole(parts, response)))
    finally:
        release()


class _EventStream(StreamingResponse):
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


class _Parts:
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
        server, began, echoed = self._server, time.monotonic(), set[int]()
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
                server.count_texts(len(self.texts), time.monotonic() - began)
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

    def _with_echo(self, part: Part, output: Any) -> Part:
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


async def _whole(parts: _Parts, response: CompletionResponse | ChatResponse) -> dict[str, Any]:
    found: dict[int, list[Part]] = {text.index: [] for text in parts.texts}
    async for part in parts():
        if part is not None:
            found[part.choice].append(part)
    return response.whole(found, parts.usage)


async def _events(
    parts: _Parts, response: CompletionResponse | ChatResponse, include_usage: bool
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


async def _unless_disconnected(request: Request, work: Any) -> Any:
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


# Errors, keys and the log


def _add_errors(app: FastAPI) -> None:
    def respond(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return respond(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return respond(_of_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> JSONResponse:
        what = {404: "there is no such path", 405: "the path does not take this method", 413: "the body is too large"}
        message = what.get(error.status_code, str(error.detail))
        return JSONResponse(ApiError(error.status_code, message).body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return respond(ApiError(500, "the server has a bug, or a part of it failed; its log says more"))


def _of_validation(errors: Sequence[Any]) -> ApiError:
    """Return the first error of a body: the one of an unknown field, if there is one."""
    found = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    path = [str(each) for each in found["loc"] if each != "body"]
    # The kinds of value that a field may have are part of pydantic's path, and not of the body.
    names = [each for each in path if "[" not in each and each not in ("str", "constrained-str", "function-after")]
    param = ".".join(names) or None
    if found["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {param!r}", param, "unknown_field")
    if found["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {found.get('ctx', {}).get('error', found['msg'])}")
    if not names and found["type"] == "model_attributes_type":
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    message = found["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message}" if param else message, param)


class _Guard:
    """Ask for a key, give each request an id, and log it."""

    def __init__(self, app: ASGIApp, server: Server):
        self._app, self._server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        log: dict[str, Any] = {}
        request_id = uuid.uuid4().hex
        scope.setdefault("state", {}).update(id=request_id, log=log)
        began, status = time.monotonic(), 0

        async def note(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        due = asyncio.get_running_loop().time() + self._server.limits.body_timeout
        is_whole = False

        async def receive_in_time() -> Any:
            nonlocal is_whole
            if is_whole:
                return await receive()
            try:
                async with asyncio.timeout_at(due):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the body did not arrive in time") from None
            is_whole = not message.get("more_body")
            return message

        try:
            if self._is_allowed(scope):
                await self._app(scope, receive_in_time, note)
            else:
                error = ApiError(401, "a valid key is needed: send Authorization: Bearer KEY", code="invalid_api_key")
                await JSONResponse(error.body, error.status, error.headers)(scope, receive, note)
        finally:
            self._server.log.write(scope, status, request_id, time.monotonic() - began, log)

    def _is_allowed(self, scope: Scope) -> bool:
        """Compare the request's key with all keys, in constant time."""
        if not self._server.keys or scope["path"] in OPEN_PATHS:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        found = [hmac.compare_digest(key.strip(), each) for each in self._server.keys]
        return scheme.lower() == b"bearer" and any(found)


def _random_seed() -> int:
    return uuid.uuid4().int >> 64
