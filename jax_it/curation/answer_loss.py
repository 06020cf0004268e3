"""The loss of answers under a model, with their prompts and without: what a prompt helps (IFD, Li et al. 2024)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jax_it.config import Data
from jax_it.data.encoded import Encoded
from jax_it.data.encoding import Counts
from jax_it.data.templates import Example
from jax_it.errors import UserError
from jax_it.generation.likelihood import LikelihoodRequest, Likelihoods
from jax_it.models import Params
from jax_it.run import Run


class AnswerLoss(NamedTuple):
    """Mean losses of an answer's tokens in nats: nan for an example without an answer."""

    loss: float  # behind its prompt
    alone: float  # without a prompt; nan where it was not asked for

    @property
    def ifd(self) -> float:
        """The ratio of the two: from 1 on, the prompt does not help the model to predict the answer."""
        return self.loss / self.alone if self.alone else math.nan


class AnswerLosses:
    """Computes them for one model, and keeps its compiled programs."""

    def __init__(self, run: Run, params: Params, batch_size: int):
        self._run, self._params = run, params
        self._likelihoods = Likelihoods(run.model, run.mesh, batch_size)
        tokenizer = run.tokenizer
        start = tokenizer.backend.bos_token_id
        # What an answer follows that has no prompt: an empty source, or the token that begins a text.
        self._nothing = [tokenizer.end if run.model.kind != "causal" or start is None else start]

    def encode(self, example: Example, location: str, data: Data) -> Encoded | None:
        """Return an example rendered and cut as for evaluation; None: it has no answer.

        Raises InvalidRecord where the chat template refuses it.
        """
        (encoded,) = self._run.format.encode(
            [example], [location], data, self._run.tokenizer, Counts(), evaluation=True
        )
        return encoded

    def __call__(self, examples: Sequence[Encoded | None], alone: bool = False) -> list[AnswerLoss]:
        """Return the losses of the examples' last answers, the end token included; `alone` is for IFD.

        Raises UserError for logits that are not finite.
        """
        requests: list[LikelihoodRequest] = []
        owners: list[tuple[int, bool]] = []
        for i, example in enumerate(examples):
            if example is None:
                continue
            prompt = self._run.format.prompt_of(example)
            answer = example.target.tolist()
            if example.loss_mask is not None:
                answer = example.target[len(prompt) :][example.loss_mask[len(prompt) :]].tolist()
            if not answer or not prompt:
                continue
            requests.append(LikelihoodRequest(prompt, [answer]))
            owners.append((i, False))
            if alone:
                requests.append(LikelihoodRequest(self._nothing, [answer]))
                owners.append((i, True))
        _check_positions(self._run, requests)
        losses = np.full((len(examples), 2), math.nan)
        for index, (found,) in self._likelihoods(self._params, requests):
            i, without = owners[index]
            losses[i, int(without)] = -found.log_prob / len(requests[index].continuations[0])
        return [AnswerLoss(float(loss), float(bare)) for loss, bare in losses]


def _check_positions(run: Run, requests: Sequence[LikelihoodRequest]) -> None:
    """Refuse examples that are too long for a model with learned positions."""
    positions = run.model.config.positions
    longest = max((len(request.prompt) + len(request.continuations[0]) for request in requests), default=0)
    if positions and longest > positions:
        raise UserError(
            f"an example has {longest} tokens, more than the model's {positions} positions; lower --max-seq-length"
        )
