"""Rows of tokens that are trained beside adapters: PEFT's `trainable_token_indices` and their tensors, in and out."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_it import sharding
from jax_it.errors import UserError, shown
from jax_it.models import Model, Params
from jax_it.models.config_json import is_int
from jax_it.models.lora import vocabulary_weights
from jax_it.models.weights import flatten
from jax_it.pretrained.folder import find_folder
from jax_it.pretrained.safetensors import TensorReader

PREFIX = "base_model.model."
_ROWS, _WHOLE = ".token_adapter.trainable_tokens_delta", ".token_adapter.base_layer.weight"
_RENAMED = {"embed_out": "lm_head"}  # GPT-NeoX's head in Transformers 5, which saves it under its former name


class TokenRows(NamedTuple):
    """Rows of an embedding or a head in one tensor of PEFT's."""

    path: str  # of the weight
    module: str
    ids: list[int]  # the token of each row

    @property
    def name(self) -> str:
        return PREFIX + self.module + _ROWS


def by_module(values: Mapping[str, Any], where: str) -> dict[str, list[int]]:
    """Read `trainable_token_indices`: the tokens whose rows are trained, by module; "" is the input embedding."""
    given = values.get("trainable_token_indices")
    named = given if isinstance(given, dict) else {"": given} if given else {}
    for ids in named.values():
        if not isinstance(ids, list) or not ids or not all(is_int(id) and 0 <= id < 2**31 for id in ids):
            raise UserError(f"{where}: trainable_token_indices={shown(given)} must be token ids, or those of modules")
    return named


def read(values: Mapping[str, Any], model: Model, where: str) -> list[TokenRows]:
    """Return the rows that an adapter_config.json names, for this base model."""
    modules, rows = _modules(model), []
    for name, ids in by_module(values, where).items():
        first = next(iter(modules.values()))[0]  # the input embedding
        found = [
            TokenRows(path, module, ids)
            for path, each in modules.items()
            for module in each
            if (_ends(module, name) if name else module == first)
        ]
        if not found and not (model.config.tied and _ends(_module(model.family.head), name)):
            raise UserError(
                f"{where}: trainable_token_indices names {shown(name)}, which is neither an embedding nor a head"
            )
        rows += found
    if any(set(each.ids) != set(rows[0].ids) for each in rows):
        raise UserError(f"{where}: trainable_token_indices has other tokens for some modules; jax_it needs the same")
    if max((id for each in rows for id in each.ids), default=0) >= model.config.vocab_size:
        raise UserError(
            f"{where}: trainable_token_indices go beyond the {model.config.vocab_size} rows of this model's embedding"
        )
    if rows and _is_t5(model):
        rows = _of_t5(rows, model, where)
    return rows


def _of_t5(rows: list[TokenRows], model: Model, where: str) -> list[TokenRows]:
    """Add the head's rows: PEFT takes T5's head for tied, and gives it the embedding's unless it is told otherwise."""
    given = {each.module for each in rows}
    if given == {"shared"}:
        return rows if model.config.tied else [*rows, rows[0]._replace(path="head")]
    if model.config.tied or given != {"encoder.embed_tokens", "decoder.embed_tokens", "lm_head"}:
        raise UserError(
            f"{where}: trainable_token_indices names {', '.join(sorted(given))}; of a T5, jax_it reads those of shared"
        )
    return rows


def to_write(model: Model) -> list[TokenRows]:
    """Return the rows as PEFT must have them."""
    assert model.adapter is not None
    ids, modules = list(model.adapter.token_ids), _modules(model)
    rows = []
    for path in model.adapter.token_weights:
        names = modules[path] if model.kind == "seq2seq" else modules[path][:1]
        if _is_t5(model):
            # Where PEFT finds the same indices for the head as for the embedding, it gives it the embedding's rows. One
            # that is named twice tells them apart, as here they may differ.
            names = names[:1] if model.config.tied else names[1:] or names
        rows += [TokenRows(path, name, ids) for name in names]
    if _is_t5(model) and not model.config.tied:
        rows = [each._replace(ids=[*ids, ids[-1]]) if each.path == "head" else each for each in rows]
    return rows


def tensors_of(model: Model, leaves: Mapping[str, np.ndarray], dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Return PEFT's (name, tensor) pairs of the rows, which `leaves` holds by path."""
    assert model.adapter is not None
    if not model.adapter.token_ids:
        return
    for each in to_write(model):
        places = [model.adapter.token_ids.index(id) for id in each.ids]
        yield each.name, leaves[f"{each.path}.rows"][places].astype(dtype)


def check_tensors(model: Model, rows: Sequence[TokenRows], tensors: TensorReader, base: str) -> set[str]:
    """Return the names of the tensors that have to do with the rows. Raises UserError for what jax_it cannot follow.

    Where the vocabulary has grown, PEFT saves the embeddings as a whole too: what the base model has of them must be
    the same. `base` is its folder or hub name.
    """
    shapes = {path: shape.shape for path, shape in flatten(model.shapes).items()}
    for each in rows:
        _check_shape(each.name, (len(each.ids), shapes[each.path][1]), tensors)
    names, known = tensors.names(), {each.name for each in rows}
    if not rows:
        return known
    ids = rows[0].ids
    modules = {module: path for path, each in _modules(model).items() for module in each}
    if model.config.tied:
        modules[_module(model.family.head)] = "embedding"
        twin = PREFIX + _module(model.family.head) + _ROWS  # PEFT may save the tied head's rows too
        if twin in names - known:
            _check_shape(twin, tensors.shape(rows[0].name), tensors)
            known.add(twin)
    for module, path in modules.items():
        for name in {PREFIX + module + _WHOLE, f"{PREFIX}{module}.weight"} & names:
            _check_shape(name, shapes[path], tensors)
            _check_frozen(name, model.weights[path].name, ids, tensors, base)
            known.add(name)
    return known


def _check_shape(name: str, shape: tuple[int, ...], tensors: TensorReader) -> None:
    if name not in tensors.names():
        raise UserError(f"{tensors.folder} lacks {name}, which its trainable_token_indices ask for")
    if tensors.shape(name) != shape:
        raise UserError(f"{tensors.folder}: {name} has shape {tensors.shape(name)}, and this base model needs {shape}")


def _check_frozen(name: str, of_base: str, ids: Sequence[int], tensors: TensorReader, base: str) -> None:
    """Refuse an embedding of which other rows than those of the tokens were trained."""
    with TensorReader(find_folder(base)) as original:
        if of_base not in original.names():
            return
        pieces = 4096
        for start in range(0, original.shape(of_base)[0], pieces):
            theirs = original.read(of_base, (slice(start, start + pieces),)).astype(np.float32)
            ours = tensors.read(name, (slice(start, start + len(theirs)),)).astype(np.float32)
            differ = np.flatnonzero((ours != theirs).any(1)) + start
            if len(other := np.setdiff1d(differ, ids)):
                raise UserError(
                    f"{tensors.folder}: {name} differs from the base model's at token {other[0]}, which is not in "
                    "trainable_token_indices; merge the adapter with PEFT, and use that model"
                )


def read_params(
    model: Model, rows: Sequence[TokenRows], tensors: TensorReader, dtype: str, mesh: jax.sharding.Mesh
) -> Params:
    """Return the rows as the params have them, sharded over the mesh."""
    assert model.adapter is not None
    found: dict[str, Any] = {}
    for each in rows:
        array = tensors.read(each.name, ())
        places = {id: place for place, id in enumerate(each.ids)}
        array = array[[places[id] for id in model.adapter.token_ids]].astype(jnp.dtype(dtype))
        if each.path in found and not np.array_equal(found[each.path], array):
            raise UserError(f"{tensors.folder}: {each.name} differs from another module's rows of one embedding")
        found[each.path] = array

    def place(array: np.ndarray) -> Any:
        split = jax.sharding.NamedSharding(mesh, sharding.spec("V D", array.shape, mesh))
        return {"rows": jax.make_array_from_callback(array.shape, split, lambda index: array[index])}

    return {path: place(array) for path, array in found.items()}


def _modules(model: Model) -> dict[str, list[str]]:
    """Return the modules with the rows of each embedding and head, the input embedding first."""
    family, found = model.family, {}
    for path in vocabulary_weights(model.weights):
        name = model.weights[path].name
        found[path] = [_module(name), *(_module(alias) for alias, of in (family.aliases or {}).items() if of == name)]
        if path == "embedding" and model.config.tied and model.kind == "seq2seq" and not _is_t5(model):
            found[path].append(_module(family.head))  # PEFT ties to the input embedding alone, the encoder's
    return found


def _is_t5(model: Model) -> bool:
    """Return whether it is an encoder-decoder with one embedding, "shared"."""
    return model.family.embedding == "shared.weight"


def _module(name: str) -> str:
    name = name.removesuffix(".weight")
    return _RENAMED.get(name, name)


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")
