"""Folders in Transformers format: config.json and safetensors, read into shards and written back.

The weight table of the family is the only converter. Reading is strict: a weight that is missing,
unknown or of another shape is a UserError that names it.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from jax_it import sharding
from jax_it.config import Model as ModelConfig
from jax_it.errors import UserError
from jax_it.models import FAMILIES, Model, Params, build, with_tied_head
from jax_it.models.weights import Weight, flatten, unflatten

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # as Transformers' own default
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


def find_folder(path: str) -> Path:
    """A local folder, or the local copy of a hub repository, downloaded where it is not there yet."""
    if Path(path).is_dir():
        return Path(path)
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"model folder {path} does not exist")
    import huggingface_hub  # slow to import, and needed for names alone
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(huggingface_hub.snapshot_download(path, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model {path!r} is no local folder and could not be fetched from the hub: {reason}") from error


def read_values(model: ModelConfig) -> tuple[dict[str, Any], str]:
    """The values of config.json, with the config's `architecture` over them, and where they come from."""
    values: dict[str, Any] = {}
    where = "config.model.architecture"
    if model.path:
        file = find_folder(model.path) / "config.json"
        where = str(file)
        try:
            values = json.loads(file.read_text())
        except FileNotFoundError:
            raise UserError(f"{file} is missing: {model.path} is not a model in Transformers format") from None
        except ValueError as error:
            raise UserError(f"{file} is not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise UserError(f"{file} holds no JSON object: {model.path} is not a model in Transformers format")
    return {**values, **model.architecture}, where


def load(model: ModelConfig, mesh: jax.sharding.Mesh, seed: int = 0) -> tuple[Model, Params]:
    """A model and its params, sharded over the mesh, read from its folder or drawn at random by `seed`."""
    values, where = read_values(model)
    dtype = jnp.dtype(model.param_dtype)
    if not model.pretrained:
        return (built := build(values, where, model)), initialise(built, mesh, seed, dtype)
    with ExitStack() as stack:
        tensors = Tensors(find_folder(model.path), stack)
        built = tensors.settle(build(values, where, model))
        return built, read_params(built, tensors, mesh, dtype)


def initialise(model: Model, mesh: jax.sharding.Mesh, seed: int, dtype: Any) -> Params:
    """Random params, each made in its shards."""
    shardings = sharding.shardings(model.letters, model.shapes, mesh)

    def init(key: jax.Array) -> Params:
        return jax.tree.map(lambda leaf: leaf.astype(dtype), model.init(key))

    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


class Tensors:
    """The tensors of a folder's safetensors files, by name, read a slice at a time."""

    def __init__(self, folder: Path, stack: ExitStack):
        self.folder = folder
        self._files: dict[str, Any] = {}
        for file in self._find_files():
            try:
                opened = stack.enter_context(safetensors.safe_open(folder / file, framework="numpy"))
            except FileNotFoundError:
                raise UserError(f"{folder / file} is missing, but {INDEX} names it; fetch the folder again") from None
            except safetensors.SafetensorError as error:
                raise UserError(f"{folder / file} is damaged ({error}); fetch it again") from None
            self._files |= dict.fromkeys(opened.keys(), opened)

    def _find_files(self) -> list[str]:
        index = self.folder / INDEX
        if index.is_file():
            try:
                return sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{index} is damaged: it has no weight_map; fetch it again") from None
        if (self.folder / SINGLE).is_file():
            return [SINGLE]
        if any(self.folder.glob("pytorch_model*.bin")):
            raise UserError(
                f"{self.folder} holds pytorch_model.bin, which can run code when read; convert it once with "
                "Transformers: AutoModelForSeq2SeqLM.from_pretrained(folder).save_pretrained(folder)"
            )
        raise UserError(f"{self.folder} has no {SINGLE}; set config.model.pretrained=False for random weights")

    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        return self._files[name].get_slice(name)[slices]

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors are equal, compared in pieces of a bounded size."""
        if self.shape(name) != self.shape(other):
            return False
        rows, length = 4096, self.shape(name)[0]
        pieces = (slice(i, min(i + rows, length)) for i in range(0, length, rows))
        return all(np.array_equal(self.read(name, (p,)), self.read(other, (p,))) for p in pieces)

    def settle(self, model: Model) -> Model:
        """The model whose head is tied where the weights say so, whatever config.json says.

        Transformers 5 does the same: it ties the head unless the checkpoint has one that differs.
        """
        family = FAMILIES[model.config.model_type]
        there = family.HEAD in self._files
        tied = not there or ("shared.weight" in self._files and self.same(family.HEAD, "shared.weight"))
        return with_tied_head(model, tied)


def read_params(model: Model, tensors: Tensors, mesh: jax.sharding.Mesh, dtype: Any) -> Params:
    """The params, each shard cut straight out of the files. Raises UserError for weights that do not fit."""
    shapes = flatten(model.shapes)
    _check_names(model, tensors, shapes)
    params = {}
    for path, weight in model.weights.items():
        shape = shapes[path].shape
        place = jax.sharding.NamedSharding(mesh, sharding.spec(weight.letters, shape, mesh))
        params[path] = jax.make_array_from_callback(shape, place, partial(_read_part, weight, shape, tensors, dtype))
    return unflatten(params)


def _read_part(
    weight: Weight, shape: tuple[int, ...], tensors: Tensors, dtype: Any, index: tuple[slice, ...]
) -> np.ndarray:
    return weight.cut(shape, index, tensors.read).astype(dtype)


def _check_names(model: Model, tensors: Tensors, shapes: Mapping[str, Any]) -> None:
    family = FAMILIES[model.config.model_type]
    wanted = {
        name: weight.tensor_shape(shapes[path].shape)
        for path, weight in model.weights.items()
        for name in weight.names(shapes[path].shape)
    }
    there = tensors.names()
    if missing := sorted(wanted.keys() - there):
        raise UserError(f"{tensors.folder} lacks {len(missing)} weight(s) that its config.json asks for: {missing[0]}")
    for name, shape in wanted.items():
        if tensors.shape(name) != shape:
            raise UserError(
                f"{tensors.folder}: {name} has shape {tensors.shape(name)}, but config.json asks for {shape}"
            )
    aliases = family.ALIASES | ({family.HEAD: "shared.weight"} if model.config.tied else {})
    for name in sorted(there - wanted.keys() - set(family.IGNORED)):
        if name not in aliases:
            raise UserError(f"{tensors.folder}: {name} is a weight that a {model.config.model_type} does not have")
        if not tensors.same(name, aliases[name]):
            raise UserError(f"{tensors.folder}: {name} differs from {aliases[name]}, and untying them is not supported")


def save(folder: Path, model: Model, params: Params, dtype: str = "") -> None:
    """Writes config.json and the weights, in `dtype` or the one that config.json names.

    The caller hands an empty folder over and sees to it that it is whole or absent.
    """
    name = dtype or model.values.get("dtype") or model.values.get("torch_dtype") or "float32"
    if name not in _DTYPES:
        raise UserError(f"cannot save weights as {name!r}; choose one of {', '.join(_DTYPES)}")
    (folder / "config.json").write_text(json.dumps(_values_to_save(model, name), indent=2, sort_keys=True) + "\n")
    shards: list[dict[str, np.ndarray]] = [{}]
    size, places, total = 0, {}, 0
    leaves = flatten(params)
    for path, weight in model.weights.items():
        for tensor_name, tensor in _tensors(weight, leaves[path], _DTYPES[name]):
            if size and size + tensor.nbytes > SHARD_BYTES:
                _write_shard(folder, len(shards), shards[-1])
                shards.append({})
                size = 0
            shards[-1][tensor_name] = tensor
            places[tensor_name] = len(shards)
            size += tensor.nbytes
            total += tensor.nbytes
    _write_shard(folder, len(shards), shards[-1])
    files = {i: f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)}
    if len(shards) == 1:
        files[1] = SINGLE
    for i, file in files.items():
        (folder / f"{i}.part").rename(folder / file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {n: files[i] for n, i in sorted(places.items())}}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(folder: Path, number: int, tensors: dict[str, np.ndarray]) -> None:
    save_file(tensors, folder / f"{number}.part", metadata={"format": "pt"})
    tensors.clear()


def _tensors(weight: Weight, array: jax.Array, dtype: np.dtype) -> Any:
    """The (name, tensor) pairs of one of our arrays, a layer at a time."""
    names = weight.names(array.shape)
    for i, name in enumerate(names):
        part = np.asarray(jax.device_get(array[i] if weight.stacked else array))
        yield name, weight.restore(part).astype(dtype)


def _values_to_save(model: Model, dtype: str) -> dict[str, Any]:
    """config.json as read, with what Transformers needs to rebuild this very model."""
    values = {key: value for key, value in model.values.items() if key not in ("torch_dtype", "_name_or_path")}
    family = FAMILIES[model.config.model_type]
    values |= {"dtype": dtype, "architectures": [family.ARCHITECTURES[model.config.model_type]]}
    return values | family.values_to_save(model.config)


def save_generation_settings(source: Path | None, target: Path, model: Model) -> None:
    """Writes generation_config.json: that of the folder the model came from, or the marks that decoding needs."""
    file = "generation_config.json"
    if source is not None and (source / file).is_file():
        shutil.copy(source / file, target)
        return
    config = model.config
    marks = {
        "decoder_start_token_id": config.start_token,
        "eos_token_id": config.end_token,
        "pad_token_id": config.pad_token,
    }
    (target / file).write_text(json.dumps(marks, indent=2) + "\n")
