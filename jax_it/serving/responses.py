"""Texts to OpenAI's objects: whole, or chunk by chunk."""

import math
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jax_it.data.tokenizer import Tokenizer
from jax_it.generation import RequestOutput
from jax_it.generation.requests import PromptLogProbs, TopLogProbs
from jax_it.serving import tools
from jax_it.serving.detokenizer import Detokenizer
from jax_it.serving.schemas import ChatRequest, CompletionRequest
from jax_it.serving.worker import Prompt

LEAST_LOG_PROB = -9999.0  # what OpenAI's servers write for minus infinity, which JSON does not have


class TokenLogProb(NamedTuple):
    token: str
    log_prob: float | None  # None: of a prompt's first token
    top: list[tuple[str, float]]  # the likeliest tokens there, the one of the text among them


class Part(NamedTuple):
    """What is new of one text."""

    choice: int  # its index
    text: str
    log_probs: list[TokenLogProb]
    finish_reason: str | None


class Text:
    """One text of a response, while it is generated."""

    def __init__(self, index: int, prompt: Prompt, tokenizer: Tokenizer, logprobs: bool):
        self.index, self.prompt = index, prompt
        self._tokenizer, self._logprobs = tokenizer, logprobs
        cleans_up = bool(getattr(tokenizer.backend, "clean_up_tokenization_spaces", False))
        self._detokenizer = Detokenizer(tokenizer.decode, prompt.stop, cleans_up, tokenizer.byte_tokens)
        self._scored = 0  # log-probabilities shown so far
        self.tokens = 0
        self.finish_reason: str | None = None

    def add(self, output: RequestOutput) -> Part:
        """Return what is new in an output, which has all tokens so far."""
        self.tokens = len(output.tokens)
        self.finish_reason = output.finish_reason
        text = self._detokenizer.add(output.tokens, output.finish_reason is not None)
        log_probs: list[TokenLogProb] = []
        if self._logprobs and output.log_probs is not None:
            # An end token has a log-probability, and is not among the tokens.
            tokens = [*output.tokens, self._tokenizer.end][: len(output.log_probs)]
            log_probs = token_log_probs(
                self._tokenizer, tokens, output.log_probs, output.top_log_probs, self.prompt.logprobs or 0, self._scored
            )
            self._scored = len(output.log_probs)
        return Part(self.index, text, log_probs, output.finish_reason)


def token_log_probs(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    log_probs: Sequence[float],
    top: TopLogProbs | None,
    number: int,
    begin: int = 0,
) -> list[TokenLogProb]:
    """Return the tokens' log-probabilities from place `begin` on, with those of the `number` likeliest ones there."""
    found = []
    for i in range(begin, len(log_probs)):
        token, log_prob = tokenizer.text([tokens[i]]), _finite(log_probs[i])
        alternatives: list[tuple[str, float]] = []
        if top is not None and number:
            ids, values = top.tokens_NA[i][:number].tolist(), top.log_probs_NA[i][:number].tolist()
            alternatives = [(tokenizer.text([id]), _finite(value)) for id, value in zip(ids, values, strict=True)]
            if tokens[i] not in ids:
                alternatives.append((token, log_prob))
        found.append(TokenLogProb(token, log_prob, alternatives))
    return found


def prompt_log_probs(
    tokenizer: Tokenizer, tokens: Sequence[int], found: PromptLogProbs | None, number: int
) -> list[TokenLogProb]:
    """Return a prompt's log-probabilities; its first token has none."""
    first = TokenLogProb(tokenizer.text([tokens[0]]), None, [])
    if found is None:
        return [first]
    return [first, *token_log_probs(tokenizer, tokens[1:], found.log_probs_N.tolist(), found.top, number)]


def _finite(log_prob: float) -> float:
    return log_prob if math.isfinite(log_prob) else LEAST_LOG_PROB


def usage(prompts: Sequence[Prompt], texts: Sequence[Text]) -> dict[str, int]:
    read, written = sum(len(prompt.tokens) for prompt in prompts), sum(text.tokens for text in texts)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


class CompletionResponse:
    """The objects of /v1/completions."""

    def __init__(self, request: CompletionRequest, model: str, id: str):
        self._request = request
        self._offsets: dict[int, int] = {}  # characters of each text's tokens so far
        self._head = {"id": f"cmpl-{id}", "object": "text_completion", "created": int(time.time()), "model": model}

    def first(self, index: int) -> list[dict[str, Any]]:
        return []

    def chunks(self, part: Part) -> Iterator[dict[str, Any]]:
        if part.text or part.log_probs or part.finish_reason:
            yield self._head | {"choices": [self._choice(part)]}

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        return self._head | {"choices": [], "usage": usage}

    def whole(self, parts: Mapping[int, list[Part]], usage: dict[str, int]) -> dict[str, Any]:
        return self._head | {"choices": [self._choice(join(each)) for each in parts.values()], "usage": usage}

    def _choice(self, part: Part) -> dict[str, Any]:
        log_probs = None
        if self._request.logprobs is not None:
            log_probs = self._log_probs(part)
        return {"index": part.choice, "text": part.text, "logprobs": log_probs, "finish_reason": part.finish_reason}

    def _log_probs(self, part: Part) -> dict[str, Any]:
        offsets, at = [], self._offsets.get(part.choice, 0)
        for each in part.log_probs:
            offsets.append(at)
            at += len(each.token)
        self._offsets[part.choice] = at
        return {
            "tokens": [each.token for each in part.log_probs],
            "token_logprobs": [each.log_prob for each in part.log_probs],
            "top_logprobs": [_by_text(each) for each in part.log_probs] if self._request.logprobs else None,
            "text_offset": offsets,
        }


class ChatResponse:
    """The objects of /v1/chat/completions."""

    def __init__(self, request: ChatRequest, model: str, id: str):
        self._request = request
        self._created, self._model, self._id = int(time.time()), model, f"chatcmpl-{id}"
        self._calls = bool(request.tools) and request.tool_choice != "none"
        self._texts: dict[int, str] = {}  # of texts that may be calls: so far, and how much of it was sent
        self._sent: dict[int, int] = {}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(self, index: int, delta: dict[str, Any], reason: str | None, log_probs: Any = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": log_probs, "finish_reason": reason}
        return self._head("chat.completion.chunk") | {"choices": [choice]}

    def first(self, index: int) -> list[dict[str, Any]]:
        return [self._chunk(index, {"role": "assistant", "content": ""}, None)]

    def chunks(self, part: Part) -> Iterator[dict[str, Any]]:
        log_probs = self._log_probs(part)
        if not self._calls:
            if part.text or log_probs:
                yield self._chunk(part.choice, {"content": part.text} if part.text else {}, None, log_probs)
            if part.finish_reason:
                yield self._chunk(part.choice, {}, part.finish_reason)
            return
        text = self._texts[part.choice] = self._texts.get(part.choice, "") + part.text
        content = text
        calls: list[tools.Call] = []
        if part.finish_reason:
            content, calls = tools.split(text, self._request)
        elif self._request.tool_choice == "auto":
            content = tools.content_so_far(text)
        else:
            content = ""
        sent = self._sent.get(part.choice, 0)
        if new := content[sent:]:
            self._sent[part.choice] = len(content)
            yield self._chunk(part.choice, {"content": new}, None, log_probs)
        if calls:
            yield self._chunk(
                part.choice, {"tool_calls": [{"index": i, **_call(each)} for i, each in enumerate(calls)]}, None
            )
        if part.finish_reason:
            yield self._chunk(part.choice, {}, _reason(part.finish_reason, calls))

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        return self._head("chat.completion.chunk") | {"choices": [], "usage": usage}

    def whole(self, parts: Mapping[int, list[Part]], usage: dict[str, int]) -> dict[str, Any]:
        choices = [self._choice(join(each)) for each in parts.values()]
        return self._head("chat.completion") | {"choices": choices, "usage": usage}

    def _choice(self, part: Part) -> dict[str, Any]:
        content, calls = tools.split(part.text, self._request) if self._calls else (part.text, [])
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": [_call(each) for each in calls]}
        return {
            "index": part.choice,
            "message": message,
            "logprobs": self._log_probs(part),
            "finish_reason": _reason(part.finish_reason, calls),
        }

    def _log_probs(self, part: Part) -> dict[str, Any] | None:
        if not self._request.logprobs:
            return None
        number = self._request.top_logprobs or 0
        return {
            "content": [
                {
                    **_token(each.token, each.log_prob),
                    "top_logprobs": [_token(token, value) for token, value in each.top[:number]],
                }
                for each in part.log_probs
            ],
            "refusal": None,
        }


def join(parts: Sequence[Part]) -> Part:
    """Return the parts of a text as one."""
    log_probs = [each for part in parts for each in part.log_probs]
    return Part(parts[0].choice, "".join(part.text for part in parts), log_probs, parts[-1].finish_reason)


def _by_text(entry: TokenLogProb) -> dict[str, float] | None:
    """Return the alternatives by their text; of tokens with the same text, the likeliest."""
    return None if entry.log_prob is None else dict(reversed(entry.top))


def _token(token: str, log_prob: float | None) -> dict[str, Any]:
    return {"token": token, "logprob": log_prob, "bytes": list(token.encode("utf-8", "replace"))}


def _call(call: tools.Call) -> dict[str, Any]:
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _reason(reason: str | None, calls: Sequence[tools.Call]) -> str | None:
    """Return why a text has ended: a whole one that has calls, for these."""
    return "tool_calls" if calls and reason == "stop" else reason
