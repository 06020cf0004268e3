"""Text for prompts: a list of them, or a file of rows that come back with `prediction` added."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jax_it import files, generation, hosts, sharding
from jax_it.config import Source
from jax_it.data import chat, sources
from jax_it.data.formats import Format
from jax_it.data.records import Record
from jax_it.data.templates import Turn, conversation
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError
from jax_it.generation import GREEDY, Engine, Sampling, StopStrings
from jax_it.models import Model, Params
from jax_it.run import load, make_format
from jax_it.status import Bar

Prompt = str | Sequence[Turn]


class Prediction(NamedTuple):
    text: str
    finished: bool  # False: it was cut at `max_new_tokens`
    log_probs: list[float] | None  # of each token in nats, by the model, and of the end token if one ended the text


def generate(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    batch_size: int = 32,
    mesh: jax.sharding.Mesh | None = None,
    stop: Sequence[str] = (),
) -> list[str]:
    """A text for each prompt, in their order; greedy unless `sampling` says otherwise. See `predict`."""
    one = sampling._replace(num_samples=1)
    found = predict(model, params, tokenizer, prompts, max_new_tokens, one, batch_size, mesh, stop)
    return [only.text for (only,) in found]


def predict(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    batch_size: int = 32,
    mesh: jax.sharding.Mesh | None = None,
    stop: Sequence[str] = (),
    log_probs: bool = False,
) -> list[list[Prediction]]:
    """`sampling.num_samples` texts for each prompt, in their order.

    A prompt is a text, taken as it is, or a conversation's turns, rendered with the model's chat template. A text ends
    before the first of the `stop` strings. Raises UserError for a prompt that is empty, or too long for the model.
    """
    if not prompts:
        return []
    mesh = mesh or sharding.make_mesh(sharding.whole_or_split(model.parameter_count))
    encoded = _encode(make_format(model, tokenizer), tokenizer, prompts)
    _check_room(model, encoded, max_new_tokens)
    stopping = StopStrings(stop, tokenizer.decode) if stop else None
    slots = min(batch_size, len(prompts) * sampling.num_samples)
    engine = Engine(model, mesh, max_new_tokens, slots, sampling, chat.ends(tokenizer), log_probs)
    found: list[dict[int, Prediction]] = [{} for _ in prompts]
    with Bar("generating", len(prompts), "prompts") as bar:
        for output in generation.generate(engine, params, encoded, stop=stopping):
            text = tokenizer.decode(output.tokens)
            found[output.request_id][output.sample] = Prediction(
                stopping.cut(text) if stopping else text, output.finish_reason == "stop", output.log_probs
            )
            bar.update(1 / sampling.num_samples)
    return [[texts[sample] for sample in sorted(texts)] for texts in found]


def generate_file(
    model_path: str,
    rows: list[dict[str, Any]],
    prompts: Sequence[Prompt],
    output: str | None,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    batch_size: int = 32,
    stop: Sequence[str] = (),
    log_probs: bool = False,
    forced_bos_token: str = "",
) -> list[list[Prediction]]:
    """Writes the rows with their predictions as JSON lines, where an output is named. Returns the predictions.

    A row's `prediction` is a text, or a list where several were asked for; so are its `log_probs`. Every text begins
    with `forced_bos_token`, such as "de_DE", where it is given. Raises UserError for an output that exists already.
    """
    file = None if output is None else files.locate_output(output, "--output")
    if file is not None and file.exists() and not files.is_stream(file):
        raise UserError(f"{output} is there already; name another --output, or remove it")
    model, params, tokenizer = load(model_path)
    if forced_bos_token:
        sampling = sampling._replace(forced_bos_token=tokenizer.id_of(forced_bos_token, "--forced-bos-token"))
    found = predict(model, params, tokenizer, prompts, max_new_tokens, sampling, batch_size, None, stop, log_probs)
    if file is not None and hosts.is_first():
        lines = (
            files.to_json({**row, **_fields(texts, log_probs)}, default=str)  # Parquet has dates
            for row, texts in zip(rows, found, strict=True)
        )
        files.write_output(file, "".join(f"{line}\n" for line in lines), "--output")
    return found


def _fields(texts: list[Prediction], log_probs: bool) -> dict[str, Any]:
    """What a row gets: one value, or a list of several."""
    names = ("text", "log_probs") if log_probs else ("text",)
    values = [[getattr(text, name) for text in texts] for name in names]
    return {
        {"text": "prediction"}.get(name, name): each[0] if len(each) == 1 else each
        for name, each in zip(names, values, strict=True)
    }


def _encode(format: Format, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[list[int]]:
    for i, prompt in enumerate(prompts, 1):
        for text in [prompt] if isinstance(prompt, str) else [turn.text for turn in prompt]:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                half = text[error.start]
                raise UserError(f"prompt {i} has {half!r}, half of a surrogate pair, which is not text") from None
    encoded: list[list[int]] = [[]] * len(prompts)
    texts = {i: prompt for i, prompt in enumerate(prompts) if isinstance(prompt, str)}
    talks = {i: prompt for i, prompt in enumerate(prompts) if not isinstance(prompt, str)}
    for i, tokens in zip(texts, format.text_prompts(list(texts.values()), tokenizer), strict=True):
        encoded[i] = tokens
    places = [f"prompt {i + 1}" for i in talks]
    for i, tokens in zip(talks, format.prompts(list(talks.values()), tokenizer, places), strict=True):
        encoded[i] = tokens
    if empty := [i + 1 for i, tokens in enumerate(encoded) if not tokens]:
        raise UserError(f"prompt {empty[0]} is empty, and the tokenizer has no mark to begin with; give it some text")
    return encoded


def _check_room(model: Model, prompts: Sequence[Sequence[int]], new: int) -> None:
    """Refuses what is too long for a model with learned positions, which has no others."""
    if positions := model.config.positions:
        longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
        if len(prompts[longest]) + new > positions:
            raise UserError(
                f"prompt {longest + 1} has {len(prompts[longest])} tokens, and with {new} new ones it is too long for "
                f"the model's {positions} positions; shorten it, or lower --max-new-tokens"
            )


def read_prompts(file: str) -> tuple[list[dict[str, Any]], list[Prompt]]:
    """The rows of a data file, and their prompts: the text of `prompt`, or the turns of `messages`."""
    rows, prompts = [], []
    for record in sources.read(Source(path=file), "--input"):
        rows.append(record.fields)
        prompts.append(_prompt(record))
    return rows, prompts


def _prompt(record: Record) -> Prompt:
    prompt = record.fields.get("prompt")
    if prompt is None and isinstance(record.fields.get("messages"), list):
        return conversation(record)
    if not isinstance(prompt, str):
        raise UserError(
            f"{record.where}: no text in the field 'prompt', and no 'messages'; its fields: {', '.join(record.fields)}"
        )
    return prompt
