"""The HTTP interface: its routes."""

import importlib.metadata
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.middleware.cors import CORSMiddleware

from jax_it.serving import page, prompt_templates, reference
from jax_it.serving import prompts as prompt_encoding
from jax_it.serving.admission import Server
from jax_it.serving.errors import ApiError
from jax_it.serving.guard import Guard, add_error_handlers
from jax_it.serving.models import ServedModel
from jax_it.serving.responses import ChatResponse, CompletionResponse
from jax_it.serving.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Generation,
    RenderRequest,
    TokenizeRequest,
)
from jax_it.serving.streaming import EventStream, Parts, events, unless_disconnected, whole
from jax_it.serving.worker import Prompt

STATUSES: dict[int | str, str] = {
    400: "A field is wrong, unknown or over a limit.",
    401: "The key is missing or wrong.",
    404: "There is no such model.",
    413: "The body is too large.",
    429: "The queue is full; `Retry-After` says how many seconds to wait.",
    503: "The server is shutting down, or the request took too long.",
}


def make_app(server: Server, cors_origins: Sequence[str] = ()) -> FastAPI:
    """Return the ASGI app; the worker starts and stops with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.workers.start()
        yield
        server.workers.stop()

    app = FastAPI(
        title="jax-it serve", version=importlib.metadata.version("jax-it"), lifespan=lifespan, docs_url=None,
        redoc_url=None, redirect_slashes=False,
        responses={status: {"description": text} for status, text in STATUSES.items()},
    )  # fmt: skip
    add_error_handlers(app)
    _add_generation(app, server)
    _add_tokens(app, server)
    _add_status(app, server)
    page.add_page(app)
    app.add_middleware(Guard, server=server)
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
    parts = Parts(server, served, prompts, body, echoes, log)
    if body.stream:
        options = body.stream_options
        found = events(parts, response, options is not None and options.include_usage)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return EventStream(found, release, headers)
    try:
        return JSONResponse(await unless_disconnected(request, whole(parts, response)))
    finally:
        release()
