"""What a model is asked and what it answers, and the journal: a file in which every answer is kept as soon as it comes.

A request is found in the journal by a hash of all that is asked, so that a command which is killed and run again asks
only for what it has no answer to.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from jax_it.errors import UserError


class Request(NamedTuple):
    messages: tuple[tuple[str, str], ...]  # role and text
    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0  # tells samples of one prompt apart


class Reply(NamedTuple):
    text: str
    finished: bool = True  # False: cut at max_new_tokens
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""  # why the request was refused; there is no text then


class Generator(Protocol):
    """A model that answers requests."""

    name: str

    def __call__(self, requests: Sequence[Request]) -> list[Reply]:
        """Return a reply to each, in order. Raises UserError if the model cannot be asked."""
        ...


def ask(text: str, **settings: Any) -> Request:
    """Return a request of one user turn."""
    return Request((("user", text),), **settings)


@dataclass
class Usage:
    """What a generator did, for the report."""

    requests: int = 0  # that were sent and answered
    from_journal: int = 0  # whose answer was there already
    refused: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    retried: dict[str, int] = field(default_factory=dict)  # why, and how often

    def add(self, reply: Reply) -> None:
        self.requests += 1
        self.refused += bool(reply.error)
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens

    def report(self, input_price: float = 0.0, output_price: float = 0.0) -> dict[str, Any]:
        """Return the numbers, with rates; the cost where prices of a million tokens are given."""
        found: dict[str, Any] = {
            "requests": self.requests,
            "from_journal": self.from_journal,
            "refused": self.refused,
            "retries": self.retries,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "seconds": round(self.seconds, 3),
        }
        if self.retried:
            found["retried"] = dict(sorted(self.retried.items()))
        if self.seconds and self.requests:
            found["requests_per_second"] = round(self.requests / self.seconds, 3)
            found["completion_tokens_per_second"] = round(self.completion_tokens / self.seconds, 1)
        if input_price or output_price:
            cost = self.prompt_tokens * input_price + self.completion_tokens * output_price
            found["cost"] = round(cost / 1e6, 6)
        return found


class Journal:
    """The answers to all requests so far, in a file of JSON lines that only grows; a context manager.

    `put` returns when the answer is on the disk. The last line may be half-written after a kill; it is removed.
    """

    def __init__(self, file: Path):
        self._file = file
        self._answers: dict[str, Reply] = {}
        self._stream: BinaryIO | None = None

    def __enter__(self) -> "Journal":
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            whole = 0
            if self._file.exists():
                with self._file.open("rb") as lines:
                    for number, line in enumerate(lines, 1):
                        if line.endswith(b"\n"):
                            self._read(line, number)
                            whole += len(line)
            self._stream = self._file.open("ab")
            self._stream.truncate(whole)
        except OSError as error:
            raise UserError(f"cannot write the journal {self._file}: {error.strerror}; fix that") from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _read(self, line: bytes, number: int) -> None:
        try:
            entry = json.loads(line)
            key = entry.pop("key")
            reply = Reply(**entry)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{self._file}, line {number}: not an answer; restore the journal or remove it") from None
        if not reply.error:  # a refusal cost nothing, and the endpoint's limits may have changed
            self._answers[key] = reply

    def get(self, key: str) -> Reply | None:
        return self._answers.get(key)

    def put(self, key: str, reply: Reply) -> None:
        assert self._stream is not None
        line = json.dumps({"key": key, **reply._asdict()}, ensure_ascii=True) + "\n"
        try:
            self._stream.write(line.encode())
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise UserError(f"cannot write the journal {self._file}: {error.strerror}; free space") from error
        self._answers[key] = reply


def key_of(model: str, request: Request) -> str:
    """Return the hash by which a journal knows a request to a model."""
    content = json.dumps([model, *request], ensure_ascii=True)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def origin(method: str, model: str, parents: Sequence[str], seed: int, **more: Any) -> Mapping[str, Any]:
    """Return what a record says about where it is from."""
    return {"method": method, "model": model, "parents": list(parents), "seed": seed, **more}
