"""Our models for lm_eval: text in, log-likelihoods and texts out.

Texts become tokens as lm_eval's own Transformers model makes them, so that scores compare: special tokens as the
tokenizer sets them unless the text begins with one, a text that is too long truncated at its left.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from tqdm import tqdm

from jax_it.data import chat
from jax_it.data.templates import Turn
from jax_it.errors import UserError, shown
from jax_it.generation import GREEDY, Engine, Sampling, StopStrings, generate
from jax_it.generation.likelihood import LikelihoodRequest, Likelihoods
from jax_it.models import Params
from jax_it.run import Run, load_run

BATCH, LENGTH, NEW = 32, 2048, 256  # defaults; the last two are lm_eval's
LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx")  # what configurations call their maximum length
TOKENS = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # names that tasks use, first one first
SAMPLING: dict[str, Callable[[Any], Any]] = {
    "top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float, "num_beams": int,
    "length_penalty": float, "early_stopping": bool, "seed": int,
}  # fmt: skip


class LoadedModel(TemplateLM):
    """A model and its weights. `between_batches` is called after each batch, equally often on all hosts.

    `max_length` in tokens truncates prompts, and is the window of long texts; 0: as the model's configuration says.
    """

    def __init__(
        self, run: Run, params: Params, name: str, max_length: int = 0, batch_size: int = BATCH, seed: int = 0
    ):
        super().__init__()
        self.path, self.params, self.batch_size, self._seed = name, params, batch_size, seed
        self.between_batches: Callable[[], None] = lambda: None
        self._model, self._tokenizer, self._mesh = run.model, run.tokenizer, run.mesh
        self.backend = "causal" if self._model.kind == "causal" else "seq2seq"
        self.tokenizer = self._tokenizer.backend  # lm_eval asks it for its chat template
        self.max_length = max_length or self._default_max_length()
        self._chat = False
        self._likelihoods = Likelihoods(self._model, self._mesh, batch_size)
        self._engines: dict[tuple[Sampling, int, bool], Engine] = {}

    def _default_max_length(self) -> int:
        values = self._model.values
        for name in LENGTHS:
            if isinstance(length := values.get(name), int):
                return length
        length = self.tokenizer.model_max_length
        return length if length < 1 << 30 else LENGTH  # tokenizers without a limit say a huge number

    # Tokens

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.end

    @property
    def prefix_token_id(self) -> int:
        """The token that a text starts with if nothing comes before it."""
        start = self.tokenizer.bos_token_id
        return self._tokenizer.end if start is None else start

    @property
    def max_gen_toks(self) -> int:
        return NEW

    @property
    def tokenizer_name(self) -> str:
        return self.path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation as training does, up to where an answer begins.

        Without `add_generation_prompt` the last message is the beginning of an answer.
        Raises UserError for a model without a chat template, and for a template that refuses the conversation.
        """
        if not self._tokenizer.chat_template:
            raise UserError(f"{self.path} has no chat template; leave --apply_chat_template out")
        self._chat = True
        turns = [Turn(message["role"], message["content"]) for message in chat_history]
        begun = "" if add_generation_prompt else turns.pop().text
        render = chat.training_prompt_text if self.backend == "causal" else chat.prompt_text
        return render(turns, self._tokenizer, f"a prompt for {self.path}") + begun

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            start = self.tokenizer.decode([self.prefix_token_id])
            add_special_tokens = not (start and string.startswith(start))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)

    # Log-likelihoods

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Score (key, context, continuation), in nats; requests with the same context are computed together."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (key, context, continuation) in enumerate(requests):
            if not continuation or len(continuation) > self.max_length:
                what = (
                    f"{len(continuation)} tokens are more than" if continuation else "no token of its own is no part of"
                )
                raise UserError(
                    f"a task's continuation {shown(key[1] if key else '', 60)}: {what} the model's {self.max_length}"
                )
            room = self.max_length + 1 - len(continuation) if self.backend == "causal" else self.max_length
            groups.setdefault(tuple(context[-room:]), []).append(i)
        members = list(groups.values())
        asked = [LikelihoodRequest(context, [requests[i][2] for i in group]) for context, group in groups.items()]
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm or None) as bar:
            for index, likelihoods in self._likelihoods(self.params, asked):
                for i, likelihood in zip(members[index], likelihoods, strict=True):
                    answers[i] = (likelihood.log_prob, likelihood.greedy)
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
                bar.update(len(members[index]))
                self.between_batches()
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, in nats, in windows of the maximum length that contain each token once."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(i)
        sums = [0.0] * len(requests)
        for i, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[i] += log_prob
        for request, log_prob in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, log_prob)
        return sums

    # Texts

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate the text after each context, up to the first of its stop strings."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="texts", disable=disable_tqdm or None) as bar:
            for group in groups.values():
                sampling, new, until = read_settings(requests[group[0]].args[1], self._seed)
                if self.backend == "causal" and new >= self.max_length:
                    raise UserError(
                        f"a task asks for {new} new tokens, which leaves nothing of the model's {self.max_length} for "
                        "its prompt; set --gen_kwargs max_gen_toks=N, or --model_args max_length=N"
                    )
                room = self.max_length - new if self.backend == "causal" else self.max_length
                prompts = [self.tok_encode(requests[i].args[0])[-room:] or [self.prefix_token_id] for i in group]
                stop = StopStrings(until, self._tokenizer.decode) if until else None
                for output in generate(self._engine(sampling, new), self.params, prompts, stop=stop):
                    i = group[output.request_id]
                    texts[i] = cut(self._tokenizer.decode(output.tokens), until)
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                    bar.update()
                    self.between_batches()
        return texts

    def _engine(self, sampling: Sampling, new: int) -> Engine:
        key = (sampling, new, self._chat)
        if key not in self._engines:
            eos_ids = chat.ends(self._tokenizer) if self._chat else (self._tokenizer.end,)
            self._engines[key] = Engine(self._model, self._mesh, new, self.batch_size, sampling, eos_ids)
        return self._engines[key]


class HarnessModel(LoadedModel):
    """A model for lm_eval's command line: a run's folder, one in Transformers or PEFT format, or a hub name."""

    def __init__(
        self,
        path: str = "",
        max_length: int = 0,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,  # lm_eval passes these two to every model; they have no effect here:
        device: str | None = None,  # all devices of JAX are used
        seed: int = 0,
        **unknown: Any,
    ):
        if unknown or not path:
            wrong = f"does not know {', '.join(unknown)}" if unknown else "needs path=DIR"
            raise UserError(f"--model_args of jax_it {wrong}; it takes path, max_length and seed")
        if jax.process_count() > 1:
            raise UserError("lm_eval's command line runs on one host; this is one of several")
        run, params = load_run(path)
        batch = BATCH if batch_size in (None, "auto") else _positive("--batch_size", batch_size)
        super().__init__(run, params, path, _positive("max_length", max_length) if max_length else 0, batch, int(seed))


def read_settings(settings: Mapping[str, Any], seed: int = 0) -> tuple[Sampling, int, tuple[str, ...]]:
    """Read a task's generation settings: how to sample, how many new tokens at most, and the stop strings.

    Raises UserError for an unknown setting.
    """
    rest = dict(settings)
    until = rest.pop("until", None) or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    lengths = [int(value) for name in TOKENS if (value := rest.pop(name, None)) is not None]
    temperature, draws = float(rest.pop("temperature", None) or 0), rest.pop("do_sample", None)
    if draws is False:
        temperature = 0.0
    elif draws and not temperature:
        temperature = 1.0
    chosen = {
        name: SAMPLING[name](rest.pop(name)) for name in list(rest) if name in SAMPLING and rest[name] is not None
    }
    if unknown := [name for name, value in rest.items() if value is not None]:
        known = ", ".join(["until", *TOKENS, "do_sample", "temperature", *SAMPLING])
        raise UserError(f"a task's generation setting {unknown[0]!r} is not known; there are: {known}")
    if not temperature:  # greedy decoding does not use these
        chosen = {name: value for name, value in chosen.items() if name not in ("top_k", "top_p", "min_p", "seed")}
    sampling = GREEDY._replace(temperature=temperature, **({"seed": seed} | chosen if temperature else chosen))
    return sampling, lengths[0] if lengths else NEW, tuple(string for string in until if string)


def cut(text: str, until: Sequence[str]) -> str:
    """Cut the text at each of the strings in turn, as lm_eval's own models do."""
    for string in until:
        text = text.split(string)[0]
    return text


def _positive(name: str, value: int | str | None) -> int:
    try:
        number = int(value or 0)
    except ValueError:
        number = 0
    if number < 1:
        raise UserError(f"{name} {value}: expected a positive number" + (", or auto" if "batch" in name else ""))
    return number
