"""Generates text for a list of prompts, or for a file of rows, which are written with a `prediction` added."""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jax_it import files, generation, hosts
from jax_it.config import Source
from jax_it.data import chat, promptsource, sources, templates
from jax_it.data.formats import Format
from jax_it.data.records import Record
from jax_it.data.templates import Turn
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError
from jax_it.generation import GREEDY, Engine, Sampling, StopStrings
from jax_it.models import Model, Params
from jax_it.run import load, make_format
from jax_it.sharding import inference_mesh
from jax_it.status import Bar

Prompt = str | Sequence[Turn]


class Prediction(NamedTuple):
    text: str
    finished: bool  # False: it reached `max_new_tokens`
    logprobs: list[float] | None  # of each token in nats, by the model, and of the end token if one ended the text


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
    raw: bool = False,
) -> list[str]:
    """Return a text for each prompt, in their order; greedy unless `sampling` says otherwise. See `predict`."""
    one = sampling._replace(num_samples=1)
    found = predict(model, params, tokenizer, prompts, max_new_tokens, one, batch_size, mesh, stop, raw=raw)
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
    logprobs: bool = False,
    raw: bool = False,
) -> list[list[Prediction]]:
    """Return `sampling.num_samples` texts for each prompt, in their order.

    A prompt is the text of a user, or the turns of a conversation that end with the user. Both are rendered as in
    training: with the tokenizer's chat template if it has one. With `raw`, a text is tokenized as it is. A generated
    text ends before the first of the `stop` strings. Raises UserError for a prompt that is empty or too long.
    """
    if not prompts:
        return []
    mesh = mesh or inference_mesh(model.parameter_count)
    encoded = encode(make_format(model, tokenizer), tokenizer, prompts, raw)
    check_length(model, encoded, max_new_tokens)
    stopping = StopStrings(stop, tokenizer.decode) if stop else None
    slots = min(batch_size, len(prompts) * sampling.num_samples)
    engine = Engine(model, mesh, max_new_tokens, slots, sampling, chat.ends(tokenizer))
    found: list[dict[int, Prediction]] = [{} for _ in prompts]
    with Bar("generating", len(prompts), "prompts") as bar:
        for output in generation.generate(engine, params, encoded, stopping, 0 if logprobs else None):
            text = tokenizer.decode(output.tokens)
            found[output.request_id][output.sample] = Prediction(
                stopping.cut(text) if stopping else text, output.finish_reason == "stop", output.log_probs
            )
            bar.update(1 / sampling.num_samples)
    return [[texts[sample] for sample in sorted(texts)] for texts in found]


def encode(format: Format, tokenizer: Tokenizer, prompts: Sequence[Prompt], raw: bool = False) -> list[list[int]]:
    """Return the token ids that generation starts from, for prompts as `predict` takes them.

    Raises UserError with the prompt's number, counted from 1.
    """
    for i, prompt in enumerate(prompts, 1):
        for text in [prompt] if isinstance(prompt, str) else [turn.text for turn in prompt]:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                half = text[error.start]
                raise UserError(f"prompt {i} has {half!r}, half of a surrogate pair, which is not text") from None
    encoded: list[list[int]] = [[]] * len(prompts)
    texts = {i: prompt for i, prompt in enumerate(prompts) if raw and isinstance(prompt, str)}
    conversations = {
        i: (Turn("user", prompt),) if isinstance(prompt, str) else prompt
        for i, prompt in enumerate(prompts)
        if i not in texts
    }
    for i, tokens in zip(texts, format.text_prompts(list(texts.values()), tokenizer), strict=True):
        encoded[i] = tokens
    places = [f"prompt {i + 1}" for i in conversations]
    for i, tokens in zip(conversations, format.prompts(list(conversations.values()), tokenizer, places), strict=True):
        encoded[i] = tokens
    if empty := [i + 1 for i, tokens in enumerate(encoded) if not tokens]:
        raise UserError(f"prompt {empty[0]} is empty, and the tokenizer has no token to begin with; add some text")
    return encoded


def check_length(model: Model, prompts: Sequence[Sequence[int]], new: int) -> None:
    """Refuse prompts that with `new` tokens are too long for a model with learned positions."""
    if positions := model.config.positions:
        longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
        if len(prompts[longest]) + new > positions:
            raise UserError(
                f"prompt {longest + 1} has {len(prompts[longest])} tokens, and with {new} new ones it is too long for "
                f"the model's {positions} positions; shorten it, or lower --max-new-tokens"
            )


def read_prompts(
    file: str, template: str = "auto", system: str = "", raw: bool = False
) -> tuple[list[dict[str, Any]], list[Prompt]]:
    """Return the rows of a data file and their prompts, made by a template as in `data.train.N.template`.

    A row's completion is ignored, and may be missing. `system` is the system prompt of rows that have none. With
    `raw` prompts are texts, else conversations. Raises UserError that names the file and the line.
    """
    rows, prompts = [], []
    (_, template), *_ = promptsource.expand([template], "--template")
    for record in sources.read(Source(path=file), "--input"):
        rows.append(record.fields)
        prompts.append(_prompt(record, template, system, raw))
    return rows, prompts


def _prompt(record: Record, template: str, system: str, raw: bool) -> Prompt:
    if "prediction" in record.fields:
        raise UserError(f"{record.where}: the row already has a field 'prediction'; rename or remove it")
    turns = templates.prompt(record, template)
    if system and all(turn.role != "system" for turn in turns):
        turns = (Turn("system", system), *turns)
    if not raw:
        return turns
    if len(turns) > 1:
        raise UserError(f"{record.where}: --raw is for a single text, and this is a conversation; leave --raw out")
    return turns[0].text


def generate_file(
    model_path: str,
    rows: list[dict[str, Any]],
    prompts: Sequence[Prompt],
    output: str | None,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    batch_size: int = 32,
    stop: Sequence[str] = (),
    logprobs: bool = False,
    forced_bos_token: str = "",
    raw: bool = False,
) -> list[list[Prediction]]:
    """Write the rows with their predictions as JSON lines, if an output is named. Return the predictions.

    A row's `prediction` is a text, or a list if several were asked for; so are its `logprobs`. Every text begins with
    `forced_bos_token`, such as "de_DE", if it is given. Says on standard error how prompts were rendered and how many
    texts are cut or empty. Raises UserError for an output that exists already.
    """
    file = None if output is None else files.locate_output(output, "--output")
    if file is not None and file.exists() and not files.is_stream(file):
        raise UserError(f"{output} already exists; name another --output, or remove it")
    model, params, tokenizer = load(model_path)
    if forced_bos_token:
        sampling = sampling._replace(forced_bos_token=tokenizer.id_of(forced_bos_token, "--forced-bos-token"))
    found = predict(model, params, tokenizer, prompts, max_new_tokens, sampling, batch_size, None, stop, logprobs, raw)
    if not hosts.is_first():
        return found
    if file is not None:
        lines = (
            files.to_json({**row, **_fields(several, logprobs)}, default=str)  # Parquet has dates
            for row, several in zip(rows, found, strict=True)
        )
        files.write_output(file, "".join(f"{line}\n" for line in lines), "--output")
    texts = [text for several in found for text in several]
    has_template = tokenizer.chat_template is not None
    if has_template and not raw:
        _report("prompts are rendered with the model's chat template; --raw leaves them unchanged")
    if cut := sum(not text.finished for text in texts):
        _report(f"{cut} of {len(texts)} texts reached --max-new-tokens {max_new_tokens} before they ended")
    if empty := sum(not text.text.strip() for text in texts):
        hint = "; without --raw, prompts are rendered with the model's chat template" if has_template and raw else ""
        _report(f"{empty} of {len(texts)} texts are empty{hint}")
    return found


def _fields(texts: list[Prediction], logprobs: bool) -> dict[str, Any]:
    """Return the fields added to a row: one value each, or a list of several."""
    values: dict[str, list[Any]] = {"prediction": [text.text for text in texts]}
    if logprobs:
        values["logprobs"] = [text.logprobs for text in texts]
    return {name: each[0] if len(each) == 1 else each for name, each in values.items()}


def _report(line: str) -> None:
    print(f"jax-it generate: {line}", file=sys.stderr, flush=True)
