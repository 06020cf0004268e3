"""What callers, scheduler and engine hand to each other: plain data, without JAX.

`models/config.py` declares the letters of axes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

INVALID = -1  # stands in place of a token whose logits were not finite

FinishReason = Literal["stop", "length", "error"]  # vLLM's


@dataclass(frozen=True)
class Request:
    """A prompt to generate from.

    `prompt` is token ids: an encoder-decoder's source with its end token, or a causal model's tokens so far. What is
    drawn for a request depends on the seed and on `request_id`, not on other requests.
    """

    request_id: int  # from 0; unique among the requests of a scheduler
    prompt: Sequence[int]
    max_new_tokens: int | None = None  # at most the engine's; None: the engine's
    stop: Callable[[Sequence[int]], bool] | None = None  # ends a text as soon as it is true of its tokens


class RequestOutput(NamedTuple):
    """One text of a request."""

    request_id: int
    sample: int  # which of the request's texts; with beam search 0 is the best
    tokens: list[int]  # all so far, without the end token
    log_probs: list[float] | None  # of each token, and of the end token if one ended the text
    finish_reason: FinishReason | None  # "stop": an end token or `stop`; "length": its limit; None: more tokens follow


class PrefillBatch(NamedTuple):
    """Prompts to prefill together and the slots that they get; a slot number of B or more is padding.

    Arrays of NumPy on the host, and of JAX on the devices.
    """

    tokens_QS: Any
    segments_QS: Any  # 1, and 0 for padding
    slots_Y: Any
    prompts_Y: Any  # which of the prompts the slot gets
    text_ids_Y: Any  # the text's number, which its draws depend on
    limits_Y: Any  # new tokens at most


class DecodeResult(NamedTuple):
    """The texts in all slots."""

    done_B: np.ndarray
    number_B: np.ndarray  # new tokens so far, the end token among them
    tokens_BOT: np.ndarray
    log_probs_BOT: np.ndarray
