"""Folders in Transformers format: what their config.json and tensors must hold, and how a model is written as one.

Reading is strict: a weight that is missing, unknown or of another shape is a UserError that names it.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from jax_it.config import Model as ModelConfig
from jax_it.errors import UserError
from jax_it.files import read_json_object
from jax_it.models import Model, Params, with_tied_head
from jax_it.models.config import EncoderDecoderConfig
from jax_it.models.lora import vocabulary_weights
from jax_it.models.weights import flatten, tensor_shapes
from jax_it.pretrained.folder import find_folder
from jax_it.pretrained.safetensors import DTYPES, TensorReader, write_files
from jax_it.pretrained.sharded import gather_tensors


def read_config_json(config: ModelConfig) -> tuple[dict[str, Any], str]:
    """Return (the values of config.json, replaced by those of `config.architecture`; the file, for messages)."""
    values: dict[str, Any] = {}
    where = "config.model.architecture"
    if config.path:
        file = find_folder(config.path) / "config.json"
        where = str(file)
        try:
            values = read_json_object(file)
        except FileNotFoundError:
            raise UserError(f"{file} is missing: {config.path} is not a model in Transformers format") from None
    return {**values, **config.architecture}, where


def with_vocab_size(values: dict[str, Any], size: int) -> dict[str, Any]:
    """Return the values of config.json with a vocabulary of `size` tokens; T5Gemma's halves have a size each."""
    halves: dict[str, Any] = {
        name: {**values[name], "vocab_size": max(size, values[name].get("vocab_size", size))}
        for name in ("encoder", "decoder")
        if name in values
    }
    return {**values, **(halves or {"vocab_size": size})}


def set_new_rows(model: Model, tensors: TensorReader, new_ids: Sequence[int]) -> None:
    """Give the embeddings and the head a row for each token of the model.

    Those of the tokens `new_ids`, and those that the files lack, are the mean of the rows of the tokens before them:
    Transformers' `resize_token_embeddings` draws them from near it, with 1e-9 of the rows' covariance.
    """
    family = model.family
    repeated = [family.head, *(family.aliases or {})]
    for name in {*(model.weights[path].name for path in vocabulary_weights(model.weights)), *repeated}:
        if name in tensors.names() and len(tensors.shape(name)) == 2:
            tensors.set_new_rows(name, max(tensors.shape(name)[0], model.config.vocab_size), new_ids)


def resolve_tying(model: Model, tensors: TensorReader) -> Model:
    """Return the model with its head tied to the embedding where the tensors are the same or there is no head.

    Transformers 5 does the same: it ties the head unless the checkpoint has one that differs. Of causal
    models, whose config.json is right about it, only those that say so.
    """
    family, names = model.family, tensors.names()
    same = family.head not in names or (family.embedding in names and tensors.same(family.head, family.embedding))
    return with_tied_head(model, same and (family.kind == "seq2seq" or model.config.tied))


def check_tensors(model: Model, tensors: TensorReader) -> None:
    """Raise UserError unless the tensors are those of the model's weight table, with their shapes."""
    family = model.family
    wanted = tensor_shapes(model.weights, flatten(model.shapes))
    there = tensors.names()
    if missing := sorted(wanted.keys() - there):
        raise UserError(f"{tensors.folder} lacks {len(missing)} weight(s) that its config.json asks for: {missing[0]}")
    for name, shape in wanted.items():
        if tensors.shape(name) != shape:
            raise UserError(
                f"{tensors.folder}: {name} has shape {tensors.shape(name)}, but config.json asks for {shape}"
            )
    aliases = {**(family.aliases or {}), **({family.head: family.embedding} if model.config.tied else {})}
    for name in sorted(there - wanted.keys()):
        if family.ignored and re.fullmatch(family.ignored, name):
            continue
        if name not in aliases:
            raise UserError(f"{tensors.folder}: {name} is a weight that a {model.config.model_type} does not have")
        if not tensors.same(name, aliases[name]):
            raise UserError(f"{tensors.folder}: {name} differs from {aliases[name]}, and untying them is not supported")


def save(folder: Path, model: Model, params: Params, dtype: str = "") -> None:
    """Write config.json and the weights into an empty folder, in `dtype` or the one that config.json names.

    The caller makes sure that the folder is whole or absent.
    """
    name = dtype or model.values.get("dtype") or model.values.get("torch_dtype") or "float32"
    if name not in DTYPES:
        raise UserError(f"cannot save weights as {name!r}; choose one of {', '.join(DTYPES)}")
    (folder / "config.json").write_text(json.dumps(_values_to_save(model, name), indent=2, sort_keys=True) + "\n")
    write_files(folder, tensors_of(model, params, DTYPES[name]))


def tensors_of(model: Model, params: Params, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Return Transformers' (name, tensor) pairs of a model without adapters, a layer at a time."""
    return gather_tensors(model.weights, flatten(params), dtype)


def _values_to_save(model: Model, dtype: str) -> dict[str, Any]:
    """Return config.json as read, with what Transformers needs to rebuild this very model."""
    values = {key: value for key, value in model.values.items() if key not in ("torch_dtype", "_name_or_path")}
    values |= {"dtype": dtype, "architectures": [model.family.architecture]}
    return values | model.family.values_to_save(model.config)


def save_generation_settings(
    source: Path | epath.Path | None, target: Path, model: Model, eos_ids: Iterable[int] = ()
) -> None:
    """Write generation_config.json: that of the folder the model came from, or the special tokens of decoding.

    A text ends at the model's end tokens and at those of `eos_ids`, with which it was trained to end its answers.
    """
    file, config = "generation_config.json", model.config
    values: dict[str, Any] = {}
    if source is not None and (source / file).exists():
        values = read_json_object(source / file)
    else:
        if isinstance(config, EncoderDecoderConfig):
            special: dict[str, Any] = {"decoder_start_token_id": config.decoder_start_token_id}
        else:
            special = {"bos_token_id": config.bos_token_id}
        special |= {"eos_token_id": list(config.eos_token_ids), "pad_token_id": config.pad_token_id}
        values = {name: token for name, token in special.items() if token not in (None, [])}
    given = values.get("eos_token_id")
    known = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in known):
        raise UserError(f"{source}/{file}: eos_token_id is {given!r}; it must be a token id or a list of them")
    together = list(dict.fromkeys([*known, *eos_ids]))
    if together:
        values["eos_token_id"] = together[0] if len(together) == 1 else together
    (target / file).write_text(json.dumps(values, indent=2) + "\n")
