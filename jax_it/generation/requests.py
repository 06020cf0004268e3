"""What callers, scheduler and engine hand to each other: plain data, without JAX.

`models/config.py` declares the letters of axes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from jax_it.errors import UserError

INVALID = -1  # stands in place of a token whose logits were not finite
MAX_NEW_TOKENS = 1 << 20  # memory for all of them is allocated before a text begins
MAX_LOGIT_BIAS = 300  # tokens of one request, as many as OpenAI takes

FinishReason = Literal["stop", "length", "error"]  # vLLM's


class Sampling(NamedTuple):
    """How tokens are chosen; the settings have the meaning, and the order of application, of Transformers' `generate`.

    The most likely token, or one drawn from the `top_k` likeliest (0: all) that hold `top_p` of the probability. With
    `num_beams` above 1 it is a beam search, as in generation/beam_search.py. The order: logit_bias, repetition_penalty,
    frequency_penalty and presence_penalty, min_new_tokens, forced_bos_token, a request's constraint, temperature,
    top_k, top_p, min_p.
    """

    temperature: float = 0.0  # 0: the most likely token
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0  # of 64 bits
    num_beams: int = 1
    length_penalty: float = 1.0  # of beams: above 0 favors longer texts
    early_stopping: bool | Literal["never"] = False  # of beams: when a prompt is done; see generation/beam_search.py
    min_p: float = 0.0  # tokens of less than this share of the likeliest one's probability are not drawn
    repetition_penalty: float = 1.0  # divides positive logits of tokens that occurred before, multiplies negative ones
    min_new_tokens: int = 0  # no end token before
    forced_bos_token: int | None = None  # the id of every text's first new token, such as a target language's
    num_samples: int = 1  # texts for each prompt: as many draws, or the best of the beams
    # OpenAI's: logits are lowered by frequency_penalty times a token's count among the new tokens, and by
    # presence_penalty if it is among them at all; logit_bias is added to those of the tokens (id, bias).
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    # Speculative decoding: the most tokens that a step drafts, from what followed the same tokens earlier in the text;
    # 0: none. For greedy decoding, whose texts stay the same. Of an engine, not of one request.
    prompt_lookup_num_tokens: int = 0
    ignore_eos: bool = False  # an end token is a token like others: texts have as many tokens as they may


GREEDY = Sampling()


def check(sampling: Sampling, max_new_tokens: int, vocab_size: int) -> None:
    """Raise UserError for numbers with which float32 scores would be infinite, and any text could come out."""
    if max_new_tokens > MAX_NEW_TOKENS:
        raise UserError(f"max_new_tokens {max_new_tokens}: a text has {MAX_NEW_TOKENS} tokens at most")
    if sampling.temperature and not 1e-6 <= sampling.temperature <= 1e30:
        raise UserError(f"temperature {sampling.temperature:g}: it must be 0 (greedy), or from 1e-6 to 1e30")
    if not 1e-6 <= sampling.repetition_penalty <= 1e30:
        raise UserError(f"repetition_penalty {sampling.repetition_penalty:g}: it must be from 1e-6 to 1e30")
    for name in ("frequency_penalty", "presence_penalty"):
        if not -1e30 <= (value := getattr(sampling, name)) <= 1e30:
            raise UserError(f"{name} {value:g}: it must be from -1e30 to 1e30")
    for name in ("top_p", "min_p"):
        if not 0 <= (value := getattr(sampling, name)) <= 1:
            raise UserError(f"{name} {value:g}: it must be from 0 to 1")
    for name in ("top_k", "min_new_tokens"):
        if not 0 <= (value := getattr(sampling, name)) < 1 << 31:
            raise UserError(f"{name} {value}: it must be from 0 to 2147483647")
    if sampling.num_samples < 1:
        raise UserError(f"num_samples {sampling.num_samples}: a prompt has one text at least")
    if len(sampling.logit_bias) > MAX_LOGIT_BIAS:
        raise UserError(f"logit_bias has {len(sampling.logit_bias)} tokens; it may have {MAX_LOGIT_BIAS}")
    for token, bias in sampling.logit_bias:
        if not (0 <= token < vocab_size and -1e30 <= bias <= 1e30):
            raise UserError(f"logit_bias {bias:g} of token {token}: the model has tokens 0 to {vocab_size - 1}")
    if not abs(sampling.length_penalty) * math.log10(max_new_tokens + 1) <= 30:
        raise UserError(
            f"length_penalty {sampling.length_penalty:g}: {max_new_tokens} tokens to this power are beyond 1e30; use "
            "one nearer to 0"
        )
    if sampling.num_beams > vocab_size:
        raise UserError(f"num_beams {sampling.num_beams}: the model has {vocab_size} tokens to begin with; use fewer")


class Constraint(Protocol):
    """Say which tokens may come next in one text, such as those that continue JSON of a schema."""

    def allowed(self, tokens: Sequence[int]) -> np.ndarray:
        """Return a bool for each token of the vocabulary [V]; `tokens` are all of the text so far.

        It is asked once before each token, with one token more than the time before. A text ends ("stop") as soon as
        no token but end tokens is allowed; end tokens have to be allowed where it may end. An exception ends it with
        "error".
        """


@dataclass(frozen=True)
class Request:
    """A prompt to generate from.

    `prompt` is token ids: an encoder-decoder's source with its end token, or a causal model's tokens so far. A text
    depends on the prompt, the settings, `index` and which of the request's samples it is: not on other requests, the
    time of arrival or `request_id`.
    """

    request_id: int  # from 0; unique among the requests of a scheduler
    prompt: Sequence[int]
    max_new_tokens: int | None = None  # at most the engine's; None: the engine's
    stop: Callable[[Sequence[int]], bool] | None = None  # ends a text as soon as it is true of its tokens
    sampling: Sampling | None = None  # None: the engine's, as always with a beam search
    index: int = 0  # requests of equal seeds and other indices draw other texts, such as the prompts of a list
    logprobs: int | None = None  # log-probabilities: None: none, 0: of chosen tokens, k: and of the k likeliest ones
    prompt_logprobs: int | None = None  # the same of the prompt's tokens; of causal models alone
    constraint: Callable[[], Constraint] | None = None  # makes one for each of the request's texts


class TopLogProbs(NamedTuple):
    """The likeliest tokens at N places, likeliest first, whatever was chosen there."""

    tokens_NA: np.ndarray  # A alternatives
    log_probs_NA: np.ndarray


class PromptLogProbs(NamedTuple):
    """What a causal model predicts of a prompt of N + 1 tokens: of all but the first."""

    log_probs_N: np.ndarray
    top: TopLogProbs | None  # with `prompt_logprobs` above 0


class RequestOutput(NamedTuple):
    """One text of a request.

    Log-probabilities are the model's own, before penalties, temperature and whatever else changes logits.
    """

    request_id: int
    sample: int  # which of the request's texts; with beam search 0 is the best
    tokens: list[int]  # all so far, without the end token
    log_probs: list[float] | None  # of each token, and of the end token if one ended the text
    finish_reason: FinishReason | None  # "stop": an end token or `stop`; "length": its limit; None: more tokens follow
    top_log_probs: TopLogProbs | None = None  # at the places of `log_probs`; with `logprobs` above 0
    prompt_log_probs: PromptLogProbs | None = None  # in every output of a request with `prompt_logprobs`


class SlotSettings(NamedTuple):
    """The settings of the texts in Y slots, as arrays: `Sampling`'s, beside what else differs between texts."""

    temperature_Y: Any
    top_k_Y: Any
    top_p_Y: Any
    min_p_Y: Any
    repetition_penalty_Y: Any
    frequency_penalty_Y: Any
    presence_penalty_Y: Any
    min_new_tokens_Y: Any
    forced_bos_token_Y: Any  # -1: none
    ignore_eos_Y: Any
    bias_tokens_YA: Any  # A tokens with a bias, then tokens of bias 0
    bias_YA: Any
    seed_Y2: Any  # the upper and the lower half
    text_id_Y: Any  # the text's number, which its draws depend on beside the seed
    limit_Y: Any  # new tokens at most
    log_probs_Y: Any  # whether log-probabilities are asked for


class TextSettings(NamedTuple):
    """What `SlotSettings` has for one text."""

    sampling: Sampling
    text_id: int
    limit: int
    log_probs: bool

    @property
    def is_plain(self) -> bool:
        """Return whether each token is the argmax of the model's own logits, and nothing else is asked."""
        return not self.log_probs and self.sampling == GREEDY._replace(
            top_k=self.sampling.top_k, top_p=self.sampling.top_p, min_p=self.sampling.min_p, seed=self.sampling.seed,
            num_beams=self.sampling.num_beams, length_penalty=self.sampling.length_penalty,
            early_stopping=self.sampling.early_stopping, num_samples=self.sampling.num_samples,
            ignore_eos=self.sampling.ignore_eos,
            prompt_lookup_num_tokens=self.sampling.prompt_lookup_num_tokens,
        )  # fmt: skip


def slot_settings(texts: Sequence[TextSettings], slots: int) -> SlotSettings:
    """Return the settings of texts as NumPy arrays, padded to a number of slots."""
    texts = [*texts, *[TextSettings(GREEDY, 0, 1, False)] * (slots - len(texts))]
    samplings = [text.sampling for text in texts]
    seeds = np.array([sampling.seed % (1 << 64) for sampling in samplings], np.uint64)
    bias_tokens, bias = np.zeros((slots, MAX_LOGIT_BIAS), np.int32), np.zeros((slots, MAX_LOGIT_BIAS), np.float32)
    for row, sampling in enumerate(samplings):
        if sampling.logit_bias:
            bias_tokens[row, : len(sampling.logit_bias)], bias[row, : len(sampling.logit_bias)] = zip(
                *sampling.logit_bias, strict=True
            )

    def column(name: str, dtype: Any) -> np.ndarray:
        return np.array([getattr(sampling, name) for sampling in samplings], dtype)

    return SlotSettings(
        temperature_Y=column("temperature", np.float32),
        top_k_Y=column("top_k", np.int32),
        top_p_Y=column("top_p", np.float32),
        min_p_Y=column("min_p", np.float32),
        repetition_penalty_Y=column("repetition_penalty", np.float32),
        frequency_penalty_Y=column("frequency_penalty", np.float32),
        presence_penalty_Y=column("presence_penalty", np.float32),
        min_new_tokens_Y=column("min_new_tokens", np.int32),
        forced_bos_token_Y=np.array([-1 if (t := s.forced_bos_token) is None else t for s in samplings], np.int32),
        ignore_eos_Y=column("ignore_eos", np.bool_),
        bias_tokens_YA=bias_tokens,
        bias_YA=bias,
        seed_Y2=np.stack([seeds >> np.uint64(32), seeds & np.uint64(0xFFFFFFFF)], axis=1).astype(np.uint32),
        text_id_Y=np.array([text.text_id for text in texts], np.int32),
        limit_Y=np.array([text.limit for text in texts], np.int32),
        log_probs_Y=np.array([text.log_probs for text in texts], np.bool_),
    )


class PrefillBatch(NamedTuple):
    """Prompts to prefill together and the slots that they get; a slot number of B or more is padding.

    Arrays of NumPy on the host, and of JAX on the devices.
    """

    tokens_QS: Any
    segments_QS: Any  # 1, and 0 for padding
    slots_Y: Any
    prompts_Y: Any  # which of the prompts the slot gets
    settings: SlotSettings


class DecodeResult(NamedTuple):
    """The texts in all slots."""

    done_B: np.ndarray
    number_B: np.ndarray  # new tokens so far, the end token among them
    tokens_BOT: np.ndarray
    log_probs_BOT: np.ndarray
    top: TopLogProbs | None = None  # arrays [B, T, A]; only if asked for
