"""The probability that a language model gives a label of a record, as Llama Guard and ShieldGemma are used."""

import math
from collections.abc import Sequence

import numpy as np

from jax_it.data import chat_template
from jax_it.data.templates import Example
from jax_it.errors import UserError, shown
from jax_it.generation.likelihood import LikelihoodRequest, Likelihoods
from jax_it.models import Params
from jax_it.run import Run


class Classifier:
    """Computes the probability of the first of some labels, among all of them, as a model's answer to a prompt.

    The prompt is that of Jinja text `template`, a chat template that also sees `prompt` and `completion`; where it is
    "", of the model's own chat template, as Llama Guard's has the whole question. Raises UserError where there is none,
    and for labels that the tokenizer cannot write or tell apart.
    """

    def __init__(
        self, run: Run, params: Params, batch_size: int, template: str, labels: Sequence[str], max_length: int
    ):
        self._run, self._params = run, params
        self._likelihoods = Likelihoods(run.model, run.mesh, batch_size)
        self._tokenizer = run.tokenizer
        if template:
            self._tokenizer = run.tokenizer.with_chat_template(template, "--classifier-prompt")
        elif run.tokenizer.chat_template is None:
            raise UserError("--classifier: this model has no chat template; give --classifier-prompt")
        self._labels = _encode(labels, run)
        self._max_length = min(max_length, run.model.config.positions or max_length)

    def prompt(self, example: Example, where: str) -> str:
        """Return the text that a label answers. Raises InvalidRecord where the template refuses the example."""
        variables = {"prompt": example.prompt, "completion": example.completion}
        return chat_template.apply(example.turns, self._tokenizer, where, generation=True, variables=variables)

    def __call__(self, prompts: Sequence[str]) -> list[float]:
        """Return the probability of the first label behind each prompt; nan where the two have too many tokens.

        Raises UserError for logits that are not finite.
        """
        start = self._tokenizer.start
        requests, owners = [], []
        for i, tokens in enumerate(self._run.format.text_prompts(prompts, self._tokenizer)):
            if start is not None and tokens[:2] == [start, start]:  # the template has written it too
                tokens = tokens[1:]
            if len(tokens) + max(map(len, self._labels)) <= self._max_length:
                requests.append(LikelihoodRequest(tokens, self._labels))
                owners.append(i)
        probabilities = [math.nan] * len(prompts)
        for index, found in self._likelihoods(self._params, requests):
            log_probs = np.array([label.log_prob for label in found])
            probabilities[owners[index]] = float(np.exp(log_probs[0] - np.logaddexp.reduce(log_probs)))
        return probabilities


def _encode(labels: Sequence[str], run: Run) -> list[list[int]]:
    """Return the labels' tokens, as answers: an encoder-decoder's with the end token."""
    tokenizer = run.tokenizer
    encoded = tokenizer.encode(labels)
    for label, tokens in zip(labels, encoded, strict=True):
        if not tokens or tokenizer.unknown in tokens:
            raise UserError(f"--classifier-labels: the tokenizer of --classifier cannot write {shown(label, 60)}")
    if len(set(map(tuple, encoded))) < len(encoded):
        raise UserError("--classifier-labels: two of them are the same tokens; exchange one")
    return [[*tokens, tokenizer.end] for tokens in encoded] if run.model.kind != "causal" else encoded
