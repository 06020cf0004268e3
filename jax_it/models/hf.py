"""Folders in Transformers format: config.json and safetensors, read into shards and written back.

The weight table of the family is the only converter. Reading is strict: a weight that is missing,
unknown or of another shape is a UserError that names it.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jax_it import sharding
from jax_it.config import Model as ModelConfig
from jax_it.errors import UserError
from jax_it.files import read_json_object
from jax_it.models import Model, Params, build, peft, with_tied_head
from jax_it.models.lora import make_adapter
from jax_it.models.quantized import KINDS, block_size, quantize
from jax_it.models.tensors import DTYPES, Tensors, find_folder, read_weight, write_files, write_weights
from jax_it.models.weights import flatten, is_vector, tensor_shapes, unflatten


def read_values(model: ModelConfig) -> tuple[dict[str, Any], str]:
    """The values of config.json, with the config's `architecture` over them, and where they come from."""
    values: dict[str, Any] = {}
    where = "config.model.architecture"
    if model.path:
        file = find_folder(model.path) / "config.json"
        where = str(file)
        try:
            values = read_json_object(file)
        except FileNotFoundError:
            raise UserError(f"{file} is missing: {model.path} is not a model in Transformers format") from None
    return {**values, **model.architecture}, where


def load(config: ModelConfig, mesh: jax.sharding.Mesh, seed: int = 0) -> tuple[Model, Params]:
    """A model and its params, sharded over the mesh: read from its folder or drawn at random by `seed`.

    With `config.lora` the params hold adapters too, those of its PEFT folder or fresh ones.
    """
    model, base = load_base(config, mesh, seed)
    if config.lora.path:
        return peft.read(config.lora.path, model, base, mesh, config.path, config.param_dtype)
    model = with_adapter(model, config)
    if model.adapter is None:
        return model, base
    return model, model.join(initialise_adapter(model, base, mesh, seed, config.param_dtype), base)


def with_adapter(model: Model, config: ModelConfig) -> Model:
    """The model with the fresh adapters that the config asks for, if it does."""
    if not config.lora.rank:
        return model
    return dataclasses.replace(model, adapter=make_adapter(config.lora, model.weights, model.depths))


def load_base(config: ModelConfig, mesh: jax.sharding.Mesh, seed: int = 0) -> tuple[Model, Params]:
    """The base model and its weights; where adapters are trained, in the form in which they stay frozen."""
    values, where = read_values(config)
    model = build(values, where, config)
    if not config.pretrained:
        return model, initialise(model, config, mesh, seed)
    with ExitStack() as stack:
        tensors = Tensors(find_folder(config.path), stack)
        tensors.add_prefix(model.family.prefix, but=model.family.head)
        model = settle_head(model, tensors)
        return model, read_params(model, tensors, mesh, storage(model, config))


def storage(model: Model, config: ModelConfig) -> dict[str, str]:
    """How each base weight is kept: the name of a dtype, or of a kind of quantisation.

    Trained weights are kept in `param_dtype`. Frozen ones need no more than the computation's precision;
    quantised are all matrices but routers, positions and biases, if their last axis can be cut into blocks.
    """
    frozen = bool(config.lora.rank or config.lora.path)
    kept: dict[str, str] = {}
    shapes = flatten(model.shapes)
    for path, weight in model.weights.items():
        matrix = not is_vector(weight.letters) and "E" not in weight.letters
        last = shapes[path].shape[-1]
        if not frozen:
            kept[path] = config.param_dtype
        elif config.quantize != "none" and matrix and weight.letters not in _NEVER_QUANTIZED and block_size(last):
            kept[path] = config.quantize
        else:
            kept[path] = jnp.dtype(model.options.dtype).name if matrix else "float32"
    return kept


_NEVER_QUANTIZED = ("L D X", "P D")


def initialise(model: Model, config: ModelConfig, mesh: jax.sharding.Mesh, seed: int) -> Params:
    """Random base weights, each made in its shards."""
    kept = storage(model, config)
    made: dict[str, Any] = {}
    for paths in _portions(flatten(model.shapes)):

        def init(key: jax.Array, paths: tuple[str, ...] = paths) -> Params:
            weights = flatten(model.init(key))  # the others are never computed
            return keep(unflatten({path: weights[path] for path in paths}), kept)

        shapes = jax.eval_shape(init, jax.random.key(0))
        letters = unflatten({path: model.weights[path].letters for path in paths})
        begin = jax.jit(init, out_shardings=sharding.shardings(letters, shapes, mesh))
        made |= flatten(jax.block_until_ready(begin(jax.random.key(seed))))
    return unflatten({path: made[path] for path in model.weights})


def _portions(shapes: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Paths to initialise together: one program for a small model, for a large one a program for each weight.

    XLA may work on all weights of a program at once, and holds several times what it returns.
    """
    portion: list[str] = []
    size = 0
    for path, shape in shapes.items():
        if portion and size + shape.size > PORTION:
            yield tuple(portion)
            portion, size = [], 0
        portion.append(path)
        size += shape.size
    yield tuple(portion)


PORTION = 4_000_000  # values


def initialise_adapter(model: Model, base: Params, mesh: jax.sharding.Mesh, seed: int, dtype: Any) -> Params:
    """Adapters that change nothing yet, each made in its shards."""

    def init(key: jax.Array, base: Params) -> Params:
        return jax.tree.map(lambda leaf: leaf.astype(dtype), model.init_adapter(key, base))

    places = sharding.shardings(model.trained_letters, model.trained_shapes, mesh)
    return jax.jit(init, out_shardings=places)(jax.random.key(seed), base)


def keep(base: Params, kept: Mapping[str, str]) -> Params:
    """Base weights in the form that `storage` says."""

    def one(array: jax.Array, kind: str) -> Any:
        if kind not in KINDS:
            return array.astype(jnp.dtype(kind))
        # A layer at a time: what is between the floats and the codes is larger than both.
        return jax.lax.map(lambda layer: quantize(layer, kind), array) if array.ndim > 2 else quantize(array, kind)

    return unflatten({path: one(leaf, kept[path]) for path, leaf in flatten(base).items()})


def settle_head(model: Model, tensors: Tensors) -> Model:
    """The model whose head is tied where the weights say so.

    Transformers 5 does the same: it ties the head unless the checkpoint has one that differs. Of causal
    models, whose config.json is right about it, only those that say so.
    """
    family, names = model.family, tensors.names()
    same = family.head not in names or (family.embedding in names and tensors.same(family.head, family.embedding))
    return with_tied_head(model, same and (family.kind == "seq2seq" or model.config.tied))


def read_params(model: Model, tensors: Tensors, mesh: jax.sharding.Mesh, kept: Mapping[str, str]) -> Params:
    """The params, each shard cut straight out of the files; `kept` is as `storage` returns it.

    Raises UserError for weights that do not fit.
    """
    shapes = flatten(model.shapes)
    _check_names(model, tensors, shapes)
    params = {
        path: read_weight(weight, shapes[path].shape, tensors.read, kept[path], mesh)
        for path, weight in model.weights.items()
    }
    return unflatten(params)


def _check_names(model: Model, tensors: Tensors, shapes: Mapping[str, Any]) -> None:
    family = model.family
    wanted = tensor_shapes(model.weights, shapes)
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
    """Writes config.json and the weights, in `dtype` or the one that config.json names.

    The caller hands an empty folder over and sees to it that it is whole or absent.
    """
    name = dtype or model.values.get("dtype") or model.values.get("torch_dtype") or "float32"
    if name not in DTYPES:
        raise UserError(f"cannot save weights as {name!r}; choose one of {', '.join(DTYPES)}")
    (folder / "config.json").write_text(json.dumps(_values_to_save(model, name), indent=2, sort_keys=True) + "\n")
    write_files(folder, tensors_of(model, params, DTYPES[name]))


def tensors_of(model: Model, params: Params, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Transformers' (name, tensor) pairs of a model without adapters, a layer at a time."""
    return write_weights(model.weights, flatten(params), dtype)


def _values_to_save(model: Model, dtype: str) -> dict[str, Any]:
    """config.json as read, with what Transformers needs to rebuild this very model."""
    values = {key: value for key, value in model.values.items() if key not in ("torch_dtype", "_name_or_path")}
    values |= {"dtype": dtype, "architectures": [model.family.architecture]}
    return values | model.family.values_to_save(model.config)


def save_generation_settings(
    source: Path | epath.Path | None, target: Path, model: Model, ends: Iterable[int] = ()
) -> None:
    """Writes generation_config.json: that of the folder the model came from, or the marks that decoding needs.

    A text ends at the model's end tokens and at those of `ends`, what it has learnt to end its answers with.
    """
    file, config = "generation_config.json", model.config
    values: dict[str, Any] = {}
    if source is not None and (source / file).exists():
        values = read_json_object(source / file)
    else:
        start = "decoder_start_token_id" if model.kind == "seq2seq" else "bos_token_id"
        marks = {start: config.start_token, "eos_token_id": list(config.end_tokens), "pad_token_id": config.pad_token}
        values = {name: mark for name, mark in marks.items() if mark not in (None, [])}
    given = values.get("eos_token_id")
    known = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in known):
        raise UserError(f"{source}/{file}: eos_token_id is {given!r}; it must be a token id or a list of them")
    together = list(dict.fromkeys([*known, *ends]))
    if together:
        values["eos_token_id"] = together[0] if len(together) == 1 else together
    (target / file).write_text(json.dumps(values, indent=2) + "\n")
