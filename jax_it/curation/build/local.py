"""A model in this process: a run directory, a Transformers or PEFT folder, or a hub name."""

import time
from collections.abc import Sequence

from jax_it import predict
from jax_it.curation.build.requests import Journal, Reply, Request, Usage, key_of
from jax_it.data.templates import Turn
from jax_it.generation import Sampling
from jax_it.run import load_run

AT_ONCE = 4  # batches of prompts between two writes to the journal


class LocalModel:
    """A `Generator` that computes; requests that the journal answers are not computed again."""

    def __init__(self, path: str, journal: Journal, usage: Usage, batch_size: int = 32):
        self.name = path
        self.usage = usage
        self._run, self._params = load_run(path)
        self._journal, self._batch_size = journal, batch_size

    def __call__(self, requests: Sequence[Request]) -> list[Reply]:
        keys = [key_of(self.name, request) for request in requests]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if self._journal.get(key) is None}
        self.usage.from_journal += len(set(keys)) - len(missing)
        groups: dict[tuple[int, float, float, tuple[str, ...]], list[str]] = {}
        for key, request in missing.items():
            settings = request.max_new_tokens, request.temperature, request.top_p, request.stop
            groups.setdefault(settings, []).append(key)
        began = time.monotonic()
        for group in groups.values():
            size = self._batch_size * AT_ONCE
            for start in range(0, len(group), size):
                self._answer({key: missing[key] for key in group[start : start + size]})
        self.usage.seconds += time.monotonic() - began
        found = [self._journal.get(key) for key in keys]
        return [reply for reply in found if reply is not None]

    def _answer(self, requests: dict[str, Request]) -> None:
        """Answer requests with the same settings, and keep the answers."""
        first = next(iter(requests.values()))
        prompts = [[Turn(role, text) for role, text in request.messages] for request in requests.values()]
        drawn = first.temperature > 0
        sampling = Sampling(
            temperature=first.temperature, top_p=first.top_p if drawn else 1.0, seed=first.seed % (1 << 32)
        )
        run = self._run
        found = predict.predict(
            run.model, self._params, run.tokenizer, prompts, first.max_new_tokens, sampling, self._batch_size, run.mesh,
            first.stop,
        )  # fmt: skip
        texts = ["\n".join(turn.text for turn in turns) for turns in prompts]
        sizes = [len(tokens) for tokens in run.tokenizer.encode([*texts, *(one.text for (one,) in found)])]
        for number, (key, (prediction,)) in enumerate(zip(requests, found, strict=True)):
            reply = Reply(prediction.text.strip(), prediction.finished, sizes[number], sizes[len(prompts) + number])
            self._journal.put(key, reply)
            self.usage.add(reply)
