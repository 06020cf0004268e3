"""Text for prompts: a list of them, or a file of rows that come back with `prediction` added."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from jax_it import sharding
from jax_it.checkpoint import write_atomically
from jax_it.config import Mesh, Source
from jax_it.data import sources
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError
from jax_it.generation import GREEDY, Generator, Sampling
from jax_it.models import Model, Params
from jax_it.workdir import load


def generate(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    batch_size: int = 32,
    mesh: jax.sharding.Mesh | None = None,
) -> list[str]:
    """A text for each prompt, in their order; greedy unless `sampling` says otherwise."""
    if not prompts:
        return []
    mesh = mesh or sharding.make_mesh(Mesh())
    encoded = [[*tokens, tokenizer.end] for tokens in tokenizer.encode(prompts)]
    generator = Generator(model, mesh, max_new_tokens, min(batch_size, len(prompts)), sampling)
    texts = [""] * len(prompts)
    with tqdm(total=len(prompts), desc="generating", unit=" prompts", disable=None, leave=False) as bar:
        for i, tokens in generator(params, encoded):
            texts[i] = tokenizer.decode(tokens)
            bar.update()
    return texts


def generate_file(
    model_path: str,
    rows: list[dict[str, Any]],
    prompts: list[str],
    output: str | None,
    max_new_tokens: int,
    sampling: Sampling,
) -> list[str]:
    """Writes the rows with their predictions as JSON lines, where an output is named. Returns the predictions."""
    if output and (Path(output).is_dir() or not Path(output).parent.is_dir()):
        raise UserError(f"cannot write {output}: it must be a file in a folder that exists")
    model, params, tokenizer = load(model_path)
    texts = generate(model, params, tokenizer, prompts, max_new_tokens, sampling)
    if output:
        lines = (
            json.dumps({**row, "prediction": text}, ensure_ascii=False, default=str)  # Parquet has dates
            for row, text in zip(rows, texts, strict=True)
        )
        try:
            write_atomically(Path(output), "".join(f"{line}\n" for line in lines))
        except OSError as error:
            raise UserError(f"cannot write {output}: {error.strerror}") from error
    return texts


def read_prompts(file: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a data file, and their prompts: the text of `prompt`, or the user's one message of `messages`."""
    rows, prompts = [], []
    for record in sources.read(Source(path=file), "--input"):
        rows.append(record.fields)
        prompts.append(_prompt(record))
    return rows, prompts


def _prompt(record: sources.Record) -> str:
    prompt = record.fields.get("prompt")
    messages = record.fields.get("messages")
    if prompt is None and isinstance(messages, list):
        texts = [str(message.get("content", "")) for message in messages if isinstance(message, dict)]
        roles = [message.get("role") for message in messages if isinstance(message, dict)]
        if roles in (["user"], ["system", "user"]):
            return "\n\n".join(texts)
        raise UserError(
            f"{record.where}: messages must be one user message, after a system message or none; got {roles}"
        )
    if not isinstance(prompt, str):
        raise UserError(
            f"{record.where}: no text in the field 'prompt', and no 'messages'; its fields: {', '.join(record.fields)}"
        )
    return prompt
