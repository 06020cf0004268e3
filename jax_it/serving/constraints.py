"""Texts that have to be JSON of a schema, by llguidance: which tokens may come next."""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import llguidance
import llguidance.hf
import llguidance.numpy
import numpy as np

from jax_it.data import chat
from jax_it.errors import UserError, shorten
from jax_it.generation.requests import Constraint
from jax_it.run import Run

WHITESPACE = r"[ \n]{0,8}"  # bounded: a model may prefer white space to all else, for ever


class Constraints:
    """Make constraints for texts of one model; its tokenizer is read for the first of them."""

    def __init__(self, run: Run):
        self._run = run

    @cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        tokenizer, config = self._run.tokenizer, self._run.model.config
        if not tokenizer.backend.is_fast:
            raise UserError(f"{tokenizer.name} has no tokenizer.json, so its texts cannot be made to be JSON")
        if lost := sorted(tokenizer.unknown_of({"{", "}", '"'}) | tokenizer.lost({"{", "}", '"'})):
            raise UserError(f"{tokenizer.name} has no token for {lost[0]}, so its texts cannot be JSON")
        ends = dict.fromkeys([*config.eos_token_ids, *chat.ends(tokenizer)])
        return llguidance.hf.from_tokenizer(tokenizer.backend, config.vocab_size, [*ends])

    def of_schema(self, schema: dict[str, Any]) -> "SchemaConstraint":
        """Return what makes a constraint for each text. Raises UserError for a schema that llguidance does not take."""
        tokenizer = self._tokenizer
        try:
            text = json.dumps(schema, allow_nan=False)
            grammar = llguidance.LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": WHITESPACE})
        except (ValueError, RecursionError) as error:
            raise UserError(f"the JSON schema is not JSON: {shorten(str(error), 300)}") from None
        matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise UserError(f"the JSON schema is not supported: {shorten(matcher.get_error(), 300)}")
        return SchemaConstraint(matcher, tokenizer.vocab_size)


class SchemaConstraint:
    """Make constraints for the texts of one request. `error` says why one of them has failed."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int):
        self._matcher, self._vocab_size = matcher, vocab_size
        self.error = ""

    def __call__(self) -> Constraint:
        return _Matching(self._matcher.deep_copy(), self._vocab_size, self)


class _Matching:
    """What one text may continue with."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, owner: SchemaConstraint):
        self._matcher, self._vocab_size, self._owner = matcher, vocab_size, owner
        self._mask = llguidance.numpy.allocate_token_bitmask(1, vocab_size)
        self._seen = 0

    def allowed(self, tokens: Sequence[int]) -> np.ndarray:
        """Return a bool for each token of the vocabulary. Raises ValueError where the text does not match."""
        self._matcher.consume_tokens(list(tokens[self._seen :]))
        self._seen = len(tokens)
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._mask)
        if self._matcher.is_error():
            self._owner.error = shorten(self._matcher.get_error(), 300)
            raise ValueError(self._owner.error)
        bits = np.unpackbits(self._mask.view(np.uint8).reshape(-1), bitorder="little")
        return bits[: self._vocab_size].astype(bool)
