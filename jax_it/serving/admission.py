"""Decide whether a request may run, and turn its fields into what the workers take."""

import asyncio
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from jax_it.errors import UserError
from jax_it.generation.requests import Sampling, check
from jax_it.serving import tools
from jax_it.serving.access_log import AccessLog
from jax_it.serving.constraints import Constraints, SchemaConstraint
from jax_it.serving.errors import ApiError
from jax_it.serving.metrics import Metrics
from jax_it.serving.models import ServedModel
from jax_it.serving.schemas import ChatRequest, CompletionRequest, Generation
from jax_it.serving.worker import Prompt, Workers


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
        self.seconds_of_request = 1.0  # a running mean

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
            seconds = math.ceil(self.seconds_of_request * waiting / max(1, self.workers.options.batch_size))
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
        if sampling.num_beams > 1 and (constraint or request.stop_strings or logprobs is not None):
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

    def _constraint(self, served: ServedModel, request: Generation) -> SchemaConstraint | None:
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


def _random_seed() -> int:
    return uuid.uuid4().int >> 64
