"""Text for prompts: a list of them, or a file of rows that come back with `prediction` added."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from jax_it import hosts, sharding
from jax_it.config import Source
from jax_it.data import chat, sources
from jax_it.data.formats import Format
from jax_it.data.templates import Turn, conversation
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError
from jax_it.files import write_atomically
from jax_it.generation import GREEDY, Generator, Sampling
from jax_it.models import Model, Params
from jax_it.workdir import load, make_format

Prompt = str | Sequence[Turn]


def generate(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    batch_size: int = 32,
    mesh: jax.sharding.Mesh | None = None,
) -> list[str]:
    """A text for each prompt, in their order; greedy unless `sampling` says otherwise.

    A prompt is a text, taken as it is, or a conversation's turns, rendered with the model's chat template.
    """
    if not prompts:
        return []
    mesh = mesh or sharding.make_mesh(sharding.whole_or_split(model.parameter_count))
    encoded = _encode(make_format(model, tokenizer), tokenizer, prompts)
    _check_room(model, encoded, max_new_tokens)
    ends = chat.ends(tokenizer)
    generator = Generator(model, mesh, max_new_tokens, min(batch_size, len(prompts)), sampling, ends)
    texts = [""] * len(prompts)
    with tqdm(total=len(prompts), desc="generating", unit=" prompts", disable=None, leave=False) as bar:
        for text in generator(params, encoded):
            texts[text.prompt] = tokenizer.decode(text.tokens)
            bar.update()
    return texts


def generate_file(
    model_path: str,
    rows: list[dict[str, Any]],
    prompts: Sequence[Prompt],
    output: str | None,
    max_new_tokens: int,
    sampling: Sampling,
) -> list[str]:
    """Writes the rows with their predictions as JSON lines, where an output is named. Returns the predictions."""
    if output and (Path(output).is_dir() or not Path(output).parent.is_dir()):
        raise UserError(f"cannot write {output}: it must be a file in a folder that exists")
    model, params, tokenizer = load(model_path)
    texts = generate(model, params, tokenizer, prompts, max_new_tokens, sampling)
    if output and hosts.is_first():
        lines = (
            json.dumps({**row, "prediction": text}, ensure_ascii=False, default=str)  # Parquet has dates
            for row, text in zip(rows, texts, strict=True)
        )
        try:
            write_atomically(Path(output), "".join(f"{line}\n" for line in lines))
        except OSError as error:
            raise UserError(f"cannot write {output}: {error.strerror}") from error
    return texts


def _encode(format: Format, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[list[int]]:
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


def _prompt(record: sources.Record) -> Prompt:
    prompt = record.fields.get("prompt")
    if prompt is None and isinstance(record.fields.get("messages"), list):
        return conversation(record)
    if not isinstance(prompt, str):
        raise UserError(
            f"{record.where}: no text in the field 'prompt', and no 'messages'; its fields: {', '.join(record.fields)}"
        )
    return prompt
