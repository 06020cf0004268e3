"""Adapters: low-rank matrices beside frozen weights (LoRA, rsLoRA, DoRA), and rows of new tokens, for every family.

An adapter's params are a tree of their own, with a node {"a", "b"} (and "magnitude" for DoRA) at the path of
each weight that has one. A is [inputs, R] and B is [R, outputs], each with the axis L of its weight before. At the
path of an embedding or a head it has a node {"rows"}: what takes the place of some tokens' rows, [tokens, D].
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import regex

from jax_it.config import Lora
from jax_it.errors import UserError, shown
from jax_it.models.linear import Adapted, column_norm, dense, merge
from jax_it.models.weights import WeightSpec, flatten, is_matrix, unflatten

ALL_LINEAR = "all-linear"
# Of a pattern and one name: seconds, and characters once its {n} are written out, as `regex` compiles them.
_SECONDS, _LONGEST = 1.0, 100_000


class Target(NamedTuple):
    """One weight with an adapter."""

    path: str
    rank: int
    scale: float  # of what the adapter adds


@dataclass(frozen=True)
class Adapter:
    targets: tuple[Target, ...]
    dora: bool
    dropout: float
    token_ids: tuple[int, ...] = ()  # tokens whose rows are trained,
    token_weights: tuple[str, ...] = ()  # in the embeddings and heads of these paths

    def logical_axes(self, weights: Mapping[str, WeightSpec]) -> dict[str, Any]:
        """Return the adapter's tree with each array's logical axes."""
        leaves = {}
        for target in self.targets:
            inputs, outputs = split_axes(weights[target.path].logical_axes)
            leaves[f"{target.path}.a"] = " ".join(["L", *inputs, "R"])
            leaves[f"{target.path}.b"] = " ".join(["L", "R", *outputs])
            if self.dora:
                leaves[f"{target.path}.magnitude"] = " ".join(["L", *outputs])
        leaves |= {f"{path}.rows": weights[path].logical_axes for path in self.token_weights}
        return unflatten(leaves)

    def init(self, key: jax.Array, weights: Mapping[str, WeightSpec], base: Mapping[str, Any]) -> dict[str, Any]:
        """Draw adapters that change nothing yet: A as in PEFT, B zero, magnitudes and rows from the weights `base`."""
        leaves: dict[str, jax.Array] = {}
        found = flatten(base)
        for number, target in enumerate(self.targets):
            inputs, _ = split_axes(weights[target.path].logical_axes)
            weight = found[target.path]
            rows, columns = weight.shape[1 : 1 + len(inputs)], weight.shape[1 + len(inputs) :]
            limit = math.prod(rows) ** -0.5
            shape, own = (weight.shape[0], *rows, target.rank), jax.random.fold_in(key, number)
            a = jax.random.uniform(own, shape, jnp.float32, -limit, limit)
            b = jnp.zeros((weight.shape[0], target.rank, *columns), jnp.float32)
            leaves |= {f"{target.path}.a": a, f"{target.path}.b": b}
            if self.dora:
                # Of the weight alone, as B is zero. XLA's CPU compiler (jaxlib 0.10.2 to 0.12.0) reads uninitialized
                # memory for A times constant zeros: for a dot with a broadcast scalar, fused with a sum (__ynn_fusion).
                leaves[f"{target.path}.magnitude"] = jax.lax.map(partial(column_norm, inputs=len(inputs)), weight)
        for path in self.token_weights:
            leaves[f"{path}.rows"] = dense(found[path], jnp.float32)[jnp.array(self.token_ids)]
        return unflatten(leaves)

    def attach(
        self, base: Mapping[str, Any], adapters: Mapping[str, Any], key: jax.Array | None = None
    ) -> dict[str, Any]:
        """Return the base's tree with `Adapted` weights; where a key is given, with dropout of the adapters' inputs."""
        leaves, found = flatten(base), flatten(adapters)
        for number, target in enumerate(self.targets):
            a = found[f"{target.path}.a"]
            keys = None
            if key is not None and self.dropout:
                keys = jax.random.split(jax.random.fold_in(key, number), a.shape[0])
            leaves[target.path] = Adapted(
                base=leaves[target.path],
                a=a,
                b=found[f"{target.path}.b"],
                magnitude=found.get(f"{target.path}.magnitude"),
                key=keys,
                scale=target.scale,
                dropout=self.dropout,
            )
        for path in self.token_weights:
            leaves[path] = self.with_rows(path, leaves[path], adapters)
        return unflatten(leaves)

    def with_rows(self, path: str, weight_VD: jax.Array, adapters: Mapping[str, Any]) -> jax.Array:
        """Return an embedding or head with the rows of the tokens that are trained, if it has such."""
        if path not in self.token_weights:
            return weight_VD
        return weight_VD.at[jnp.array(self.token_ids)].set(adapters[path]["rows"].astype(weight_VD.dtype))

    def merge(self, base: Mapping[str, Any], adapters: Mapping[str, Any], weights: Mapping[str, WeightSpec]) -> Any:
        """Return the base's tree in float32, with the adapters added to their weights."""
        found = flatten(base)
        found |= {path: found[path].astype(jnp.float32) for path in self.token_weights}  # as the rows are
        leaves = flatten(self.attach(unflatten(found), adapters))
        for path, leaf in leaves.items():
            if isinstance(leaf, Adapted):
                inputs, _ = split_axes(weights[path].logical_axes)
                leaves[path] = jax.lax.map(partial(merge, inputs=len(inputs)), leaf)
            else:
                leaves[path] = dense(leaf, jnp.float32)
        return unflatten(leaves)


def make_adapter(
    config: Lora, weights: Mapping[str, WeightSpec], layers: Mapping[str, int], new_ids: Sequence[int] = ()
) -> Adapter:
    """Return the adapter that the config asks for. `layers` says how many layers each stacked weight has.

    The rows of the tokens `new_ids` are trained too. Raises UserError for a target that is not a weight, or that names
    only some of the layers.
    """
    paths = choose_targets(config.targets, weights, layers)
    scale = config.alpha / (math.sqrt(config.rank) if config.rank_stabilized else config.rank)
    targets = tuple(Target(path, config.rank, scale) for path in paths)
    return Adapter(targets, config.dora, config.dropout, tuple(new_ids), vocabulary_weights(weights) if new_ids else ())


def vocabulary_weights(weights: Mapping[str, WeightSpec]) -> tuple[str, ...]:
    """Return the paths of the embeddings, and of a head of its own, with a row for each token."""
    return tuple(path for path, weight in weights.items() if weight.logical_axes == "V D")


def choose_targets(
    targets: Sequence[str],
    weights: Mapping[str, WeightSpec],
    layers: Mapping[str, int],
    field: str = "config.model.lora.targets",
) -> list[str]:
    """Return the paths of the weights that the targets, which `field` holds, name.

    A target is "all-linear", the end of a module's name in Transformers ("q_proj", "self_attn.q_proj"), or
    a regular expression of the whole name.
    """
    candidates = {path: weight for path, weight in weights.items() if is_linear(weight)}
    hits: dict[str, set[int]] = {}  # the layers of each weight that some target names: PEFT may list them one by one
    for target in targets:
        found = False
        for path, weight in candidates.items():
            for layer in range(layers[path]):
                name = module_name(weight, layer)
                if target in (ALL_LINEAR, name) or name.endswith(f".{target}") or matches(target, name, field):
                    hits.setdefault(path, set()).add(layer)
                    found = True
        if not found:
            names = sorted({weight.name.split(".")[-2] for weight in candidates.values()})
            raise UserError(f"{field}: {target!r} matches no weight; there are {', '.join(names)}, all-linear")
    for path, found_layers in hits.items():
        if len(found_layers) < layers[path]:
            name = candidates[path].name
            named = f"{len(found_layers)} of {layers[path]}"
            raise UserError(f"{field}: {name} is named in {named} layers; name all")
    return sorted(hits)


def matches(pattern: str, name: str, field: str) -> bool:
    """Return whether a regular expression, which may be a stranger's, matches the whole of a module's name.

    Raises UserError, which names the field that holds the pattern, where it is none or is too costly.
    """
    counts = [int(count[:9]) for braces in re.findall(r"{[^{}]*}", pattern) for count in re.findall(r"\d+", braces)]
    try:
        re.compile(pattern)  # `regex` knows more, such as patterns within themselves
        if len(pattern) * math.prod(max(1, count) for count in counts) > _LONGEST:
            raise TimeoutError
        return regex.fullmatch(pattern, name, timeout=_SECONDS) is not None
    except TimeoutError:
        raise UserError(f"{field}: {shown(pattern)} takes too long to match; write a simpler pattern") from None
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise UserError(f"{field}: {shown(pattern)} is neither a name nor a regular expression: {error}") from None


def module_name(weight: WeightSpec, layer: int) -> str:
    """Return the name in Transformers of the module that holds a layer of the weight."""
    return weight.name.format(L=layer).removesuffix(".weight")


def is_linear(weight: WeightSpec) -> bool:
    """Return whether a weight is a linear layer's, one in each layer: no embedding, head, bias, norm or expert."""
    axes = weight.logical_axes.split()
    return axes[0] == "L" and "X" not in axes and is_matrix(weight.logical_axes)


def split_axes(logical_axes: str) -> tuple[list[str], list[str]]:
    """Return a linear weight's input and output axes, without L: D | N H, N H | D, D | F."""
    axes = logical_axes.split()[1:]
    inputs = 2 if axes[0] in ("N", "K") else 1
    return axes[:inputs], axes[inputs:]
