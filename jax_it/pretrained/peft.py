"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, in and out."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jax_it.errors import UserError, shown
from jax_it.files import read_json_object
from jax_it.models import Model, Params
from jax_it.models.lora import Adapter, Target, choose_targets, is_linear, matches, module_name, split_axes
from jax_it.models.weights import WeightSpec, flatten, split_layout, tensor_shapes
from jax_it.pretrained import peft_tokens
from jax_it.pretrained.folder import find_folder
from jax_it.pretrained.safetensors import DTYPES, TensorReader
from jax_it.pretrained.sharded import gather, gather_tensors, read_params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# What of an adapter_config.json is read, or says nothing of what an adapter computes. Other keys must be empty.
_READ = frozenset(
    """
    base_model_name_or_path r lora_alpha target_modules rank_pattern alpha_pattern use_rslora use_dora lora_dropout
    auto_mapping fan_in_fan_out inference_mode peft_version revision runtime_config task_type loftq_config eva_config
    trainable_token_indices
    """.split()
)
_MAX_RANK = 1 << 16
_MAX_ALPHA = 1e30  # the scale of what an adapter adds is a float32
# These initializations leave the base model's weights as they are.
_ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    "megatron_core": ("megatron.core", None),
    "qalora_group_size": (16, None),  # read with use_qalora alone
}


def is_folder(path: str | Path) -> bool:
    """Return whether a folder holds an adapter and no model."""
    return (Path(path) / CONFIG).is_file() and not (Path(path) / "config.json").is_file()


def base_of(path: str | Path) -> str:
    """Return the folder or hub name of the model that an adapter was trained for."""
    values = _read_values(Path(path))
    base = values.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{Path(path) / CONFIG}: base_model_name_or_path names no model")
    return base


def read_adapter(path: str, model: Model) -> tuple[Adapter, Path]:
    """Read the adapter that a PEFT folder describes, for this base model, and the folder."""
    folder = find_folder(path)
    values = _read_values(folder)
    where = str(folder / CONFIG)
    for key, value in values.items():
        # 0 is a layer's number, and no empty list of layers.
        given = value != [] and value is not None if key == "layers_to_transform" else bool(value)
        if value not in _ONLY[key] if key in _ONLY else (given and key not in _READ):
            only = f"only {_ONLY[key][0]!r} is" if key in _ONLY else "it must be empty"
            raise UserError(f"{where}: {key}={shown(value)} is not supported by jax_it; {only}")
    for key in ("use_rslora", "use_dora", "fan_in_fan_out"):
        if not isinstance(values.get(key), bool | None):
            raise UserError(f"{where}: {key}={shown(values[key])} must be true or false")
    dropout = values.get("lora_dropout")
    dropout = 0.0 if dropout is None else dropout
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise UserError(f"{where}: lora_dropout={shown(dropout)} must be a number of at least 0 and below 1")
    layers = model.depths
    paths = choose_targets(_named(values, where), model.weights, layers, f"{where}: target_modules")
    patterns = {key: _patterns(values, key, where) for key in ("rank_pattern", "alpha_pattern")}
    targets = tuple(_target(path, model.weights[path], layers[path], values | patterns, where) for path in paths)
    rows = peft_tokens.read(values, model, where)
    adapter = Adapter(targets, bool(values.get("use_dora")), float(dropout))
    if rows:
        with_rows = tuple(dict.fromkeys(each.path for each in rows))
        adapter = dataclasses.replace(adapter, token_ids=tuple(dict.fromkeys(rows[0].ids)), token_weights=with_rows)
    return adapter, folder


def token_ids(path: str) -> list[int]:
    """Return the tokens whose rows of the embedding a PEFT folder's adapters have trained."""
    folder = find_folder(path)
    by_module = peft_tokens.by_module(_read_values(folder), str(folder / CONFIG))
    return sorted({id for ids in by_module.values() for id in ids})


def _named(values: Mapping[str, Any], where: str) -> list[str]:
    """Read which modules have adapters."""
    named = values.get("target_modules")
    listed = [named] if isinstance(named, str) else named
    if not isinstance(listed, list) or not listed or not all(isinstance(name, str) and name for name in listed):
        raise UserError(f"{where}: target_modules={shown(named)} must be a module's name, a pattern or a list of names")
    return sorted(listed)


def _patterns(values: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """Read PEFT's `rank_pattern` or `alpha_pattern`."""
    patterns = values.get(key)
    patterns = {} if patterns is None else patterns
    if not isinstance(patterns, dict):
        raise UserError(f"{where}: {key}={shown(patterns)} must map modules to numbers")
    return patterns


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def load(path: str, model: Model, mesh: jax.sharding.Mesh, name: str, dtype: str = "float32") -> tuple[Model, Params]:
    """Return the model with a PEFT folder's adapters, and their params in `dtype`, sharded over the mesh.

    `name` is the base model's own folder or hub name. Raises UserError for the adapters of another base model.
    """
    adapter, folder = read_adapter(path, model)
    _check_base(base_of(folder), name, folder)
    model = dataclasses.replace(model, adapter=adapter)
    with TensorReader(folder, WEIGHTS) as tensors:
        rows = peft_tokens.read(_read_values(folder), model, str(folder / CONFIG))
        _check_tensors(model, tensors, peft_tokens.check_tensors(model, rows, tensors, name))
        model, within = _with_own_ranks(model, tensors)
        table = weight_table(model, within)
        found = read_params(table, model.trained_shapes, tensors, dict.fromkeys(table, dtype), mesh)
        return model, {**found, **peft_tokens.read_params(model, rows, tensors, dtype, mesh)}


def _check_tensors(model: Model, tensors: TensorReader, others: Set[str]) -> None:
    """Raise UserError unless the tensors are those that the adapters of this base model have, and `others`."""
    file, there = tensors.folder / WEIGHTS, tensors.names()
    wanted = tensor_shapes(weight_table(model), flatten(model.trained_shapes))
    for name, shape in wanted.items():
        if name not in there:
            raise UserError(f"{file} lacks {name}, which its {CONFIG} asks for")
        if tensors.shape(name) != shape:
            raise UserError(
                f"{file}: {name} has shape {tensors.shape(name)}, and this base model needs {shape}: "
                "the adapter is for another base model"
            )
    if extra := sorted(there - wanted.keys() - others):
        raise UserError(
            f"{file}: {extra[0]} does not belong to any module of this base model: the adapter is for another one"
        )


def _with_own_ranks(model: Model, tensors: TensorReader) -> tuple[Model, dict[str, tuple[int, int]]]:
    """Undo `_put_side_by_side`: each target gets its own rank back, else every round trip would multiply it.

    Also returns how many ranks of the shared tensor lie before and after those of each such target.
    """
    assert model.adapter is not None
    table, shapes = weight_table(model), flatten(model.trained_shapes)
    own: dict[str, Target] = {}
    within: dict[str, tuple[int, int]] = {}
    for targets in _by_tensor(model).values():
        rank, left_over = divmod(targets[0].rank, len(targets))
        if len(targets) == 1 or left_over:
            continue
        blocks = [slice(i * rank, (i + 1) * rank) for i in range(len(targets))]
        filled = []
        for target, block in zip(targets, blocks, strict=True):
            shape = shapes[f"{target.path}.b"].shape
            b = table[f"{target.path}.b"].cut(shape, (slice(None),) * len(shape), tensors.read)
            filled.append(bool(b[:, block].any()) and not np.delete(b, block, axis=1).any())
        if all(filled):
            for target, block in zip(targets, blocks, strict=True):
                own[target.path] = target._replace(rank=rank)
                within[target.path] = block.start, targets[0].rank - block.stop
    adapter = dataclasses.replace(
        model.adapter, targets=tuple(own.get(target.path, target) for target in model.adapter.targets)
    )
    return dataclasses.replace(model, adapter=adapter), within


def save(folder: Path, model: Model, params: Params, base: str, dtype: str = "float32") -> None:
    """Write the adapters of `params`, for the base model of that folder or hub name, into an existing folder.

    Weights that share a tensor in Transformers, such as Phi-3's queries and keys, have adapters of their own here
    and one in PEFT: the same A, or else a rank that is the sum of theirs, written with zeros between.
    """
    assert model.adapter is not None
    leaves = _gather(model, params)
    ranks, alphas = {}, {}
    for name, targets in _by_tensor(model).items():
        module = r"\d+".join(map(re.escape, name.removesuffix(".weight").split("{L}")))
        ranks[module] = leaves[f"{targets[0].path}.a"].shape[-1]
        alphas[module] = _number(targets[0].scale * ranks[module])
    rank, alpha = (max(found.values(), key=list(found.values()).count) for found in (ranks, alphas))
    values = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if model.kind == "seq2seq" else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: found for module, found in ranks.items() if found != rank},
        "alpha_pattern": {module: found for module, found in alphas.items() if found != alpha},
        "lora_dropout": model.adapter.dropout,
        "use_rslora": False,  # alpha says what the scale is
        "use_dora": model.adapter.dora,
        "bias": "none",
        "fan_in_fan_out": model.config.model_type == "gpt2",
        "target_modules": _target_modules(model),
    }
    if model.adapter.token_ids:
        values["trainable_token_indices"] = {each.module: each.ids for each in peft_tokens.to_write(model)}
    (folder / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    tensors = dict(tensors_of(model, params, DTYPES[dtype]))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def tensors_of(model: Model, params: Params, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Return PEFT's (name, tensor) pairs of a model's adapters."""
    leaves = _gather(model, params)
    yield from gather_tensors(weight_table(model), leaves, dtype)
    yield from peft_tokens.tensors_of(model, leaves, dtype)


def _gather(model: Model, params: Params) -> dict[str, np.ndarray]:
    """Gather the adapters' arrays from all hosts, as PEFT has them: one A for the weights that share a tensor."""
    adapters, _ = model.split(params)
    leaves = {path: gather(leaf) for path, leaf in flatten(adapters).items()}
    for targets in _by_tensor(model).values():
        first, *others = (leaves[f"{target.path}.a"] for target in targets)
        if not all(np.array_equal(first, other) for other in others):
            _put_side_by_side(leaves, targets)
    return leaves


def _by_tensor(model: Model) -> dict[str, list[Target]]:
    """Return the targets that share each tensor of Transformers."""
    assert model.adapter is not None
    together: dict[str, list[Target]] = {}
    for target in model.adapter.targets:
        together.setdefault(model.weights[target.path].name, []).append(target)
    return together


def weight_table(model: Model, within: Mapping[str, tuple[int, int]] | None = None) -> dict[str, WeightSpec]:
    """Return the adapters' own weight table, which follows from that of the base model.

    `within` says how many ranks of its tensor lie before and after a target's own, where it has only some of them.
    """
    assert model.adapter is not None
    table, axes = {}, flatten(model.trained_logical_axes)
    for target in model.adapter.targets:
        weight = model.weights[target.path]
        inputs, outputs = _layouts(weight)
        name = peft_tokens.PREFIX + weight.name.removesuffix(".weight")
        before, after = (within or {}).get(target.path, (0, 0))
        ranks = f"{before}+R+{after}"
        table[f"{target.path}.a"] = WeightSpec(axes[f"{target.path}.a"], f"{name}.lora_A.weight", f"{ranks} {inputs}")
        table[f"{target.path}.b"] = WeightSpec(axes[f"{target.path}.b"], f"{name}.lora_B.weight", f"{outputs} {ranks}")
        if model.adapter.dora:
            magnitude = f"{target.path}.magnitude"
            table[magnitude] = WeightSpec(axes[magnitude], f"{name}.lora_magnitude_vector", outputs)
    return table


def _layouts(weight: WeightSpec) -> tuple[str, str]:
    """Return the axes of a tensor that are our inputs, and our outputs, as a layout writes them."""
    inputs, _ = split_axes(weight.logical_axes)
    first, second = split_layout(weight.layout)
    is_first = bool(re.search(rf"\b{inputs[0]}\b", first))
    return (first, second) if is_first else (second, first)


def _put_side_by_side(leaves: dict[str, np.ndarray], targets: list[Target]) -> None:
    """Give each of some weights that share a tensor all of their ranks: A one after another, B zero elsewhere."""
    a = np.concatenate([leaves[f"{target.path}.a"] for target in targets], axis=-1)
    start = 0
    for target in targets:
        b = leaves[f"{target.path}.b"]
        wide = np.zeros((b.shape[0], a.shape[-1], *b.shape[2:]), b.dtype)
        wide[:, start : start + target.rank] = b
        start += target.rank
        leaves[f"{target.path}.a"], leaves[f"{target.path}.b"] = a, wide


def _target(path: str, weight: WeightSpec, layers: int, values: Mapping[str, Any], where: str) -> Target:
    names = [module_name(weight, i) for i in range(layers)]
    found = [
        (
            _of_module(name, values, "rank_pattern", "r", where),
            _of_module(name, values, "alpha_pattern", "lora_alpha", where),
        )
        for name in names
    ]
    if any(other != found[0] for other in found[1:]):
        raise UserError(f"{where}: {weight.name} has another rank or alpha in some layers; jax_it needs one for all")
    rank, alpha = found[0]
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= _MAX_RANK:
        raise UserError(f"{where}: rank {shown(rank)} of {names[0]} must be a whole number from 1 to {_MAX_RANK}")
    if not _is_number(alpha) or not 0 < alpha < _MAX_ALPHA:
        raise UserError(f"{where}: lora_alpha {shown(alpha)} of {names[0]} must be a positive number")
    return Target(path, rank, alpha / (math.sqrt(rank) if values.get("use_rslora") else rank))


def _of_module(name: str, values: Mapping[str, Any], key: str, default: str, where: str) -> Any:
    """Return a module's value in `rank_pattern` or `alpha_pattern`: the first whose pattern matches the name's end."""
    parts = name.split(".")
    ends = [".".join(parts[i:]) for i in range(len(parts))]
    for pattern, value in values[key].items():
        if any(matches(pattern, end, f"{where}: {key}") for end in ends):
            return value
    return values.get(default, 8)


def _target_modules(model: Model) -> list[str]:
    """Return the modules' names in PEFT, as short as they can be without naming another module too."""
    linear = {path: weight for path, weight in model.weights.items() if is_linear(weight)}
    names = {path: [module_name(weight, i) for i in range(model.depths[path])] for path, weight in linear.items()}
    assert model.adapter is not None
    wanted = {name for target in model.adapter.targets for name in names[target.path]}
    others = {name for found in names.values() for name in found} - wanted
    for short in (lambda name: name.split(".")[-1], lambda name: re.split(r"\.\d+\.", name, maxsplit=1)[-1]):
        chosen = {short(name) for name in wanted}
        if not any(name.endswith(f".{end}") for name in others for end in chosen):
            return sorted(chosen)
    return sorted(wanted)


def _check_base(wanted: str, name: str, folder: Path) -> None:
    """Refuse a base model of another hub name; folders may have been moved, and their shapes are compared."""

    def on_hub(path: str) -> bool:
        return path.count("/") == 1 and not path.startswith((".", "/")) and not Path(path).exists()

    if on_hub(wanted) and on_hub(name) and wanted != name:
        raise UserError(f"{folder}: the adapter was trained for {wanted}, not for {name}; name that base model")
    revision = _read_values(folder).get("revision")
    if on_hub(name) and revision not in (None, "", "main"):
        raise UserError(
            f"{folder / CONFIG}: the adapter is for revision {shown(revision)} of {wanted}; download that one into a "
            "folder and name the folder as the base model"
        )


def _read_values(folder: Path) -> dict[str, Any]:
    try:
        return read_json_object(folder / CONFIG)
    except FileNotFoundError:
        raise UserError(f"{folder / CONFIG} is missing: {folder} is not an adapter in PEFT's format") from None


def _number(value: float) -> float:
    """Undo what a division and a product have rounded: 16 for 15.999999999999998."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-9) else value
