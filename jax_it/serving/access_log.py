"""One JSON line for each request; without prompts and texts, unless told."""

import datetime
import json
from collections.abc import Sequence
from typing import IO, Any

from starlette.types import Scope

from jax_it.data.tokenizer import Tokenizer
from jax_it.serving.worker import Prompt


class AccessLog:
    """Write requests to a stream; to none, if that is None."""

    def __init__(self, stream: IO[str] | None, with_prompts: bool = False):
        self._stream, self._with_prompts = stream, with_prompts

    def add_prompts(self, line: dict[str, Any], tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> None:
        if self._with_prompts and self._stream:
            line["prompts"] = [tokenizer.text(prompt.tokens) for prompt in prompts]

    def write(self, scope: Scope, status: int, request_id: str, seconds: float, more: dict[str, Any]) -> None:
        if self._stream is None:
            return
        client = scope.get("client")
        line = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "request_id": request_id,
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": scope["path"],
            "status": status or 499,  # the client went away before the answer
            "seconds": round(seconds, 4),
            **{name: value for name, value in more.items() if value is not None},
        }
        print(json.dumps(line), file=self._stream, flush=True)
