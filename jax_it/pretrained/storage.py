"""The dtype in which each weight of the base model is kept: trained in float32, frozen in few bytes (QLoRA)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jax_it.config import Model as ModelConfig
from jax_it.models import Model, Params
from jax_it.models.lora import is_linear
from jax_it.models.quantized import KINDS, block_size, quantize
from jax_it.models.weights import flatten, is_matrix, unflatten

_EXPERTS = ("L X D F", "L X F D")


def storage_dtypes(model: Model, config: ModelConfig) -> dict[str, str]:
    """Return the name of a dtype, or of a kind of quantization, for each weight of the base model by its path.

    Trained weights are kept in `param_dtype`, frozen ones in the compute dtype; norms and biases in float32. As in
    QLoRA, only linear layers and experts are quantized, those whose last axis can be cut into blocks.
    """
    trained = not (config.lora.rank or config.lora.path)
    shapes = flatten(model.shapes)
    dtypes: dict[str, str] = {}
    for path, weight in model.weights.items():
        linear = is_linear(weight) or weight.logical_axes in _EXPERTS
        if trained:
            dtypes[path] = config.param_dtype
        elif config.quantize != "none" and linear and block_size(shapes[path].shape[-1]):
            dtypes[path] = config.quantize
        elif not is_matrix(weight.logical_axes):
            dtypes[path] = "float32"
        else:
            dtypes[path] = jnp.dtype(model.options.dtype).name
    return dtypes


def cast_or_quantize(base: Params, dtypes: Mapping[str, str]) -> Params:
    """Return the base weights as `storage_dtypes` says."""

    def convert(array: jax.Array, dtype: str) -> Any:
        if dtype not in KINDS:
            return array.astype(jnp.dtype(dtype))
        # One layer at a time: the intermediate arrays are larger than the floats and the codes.
        return jax.lax.map(lambda layer: quantize(layer, dtype), array) if array.ndim > 2 else quantize(array, dtype)

    return unflatten({path: convert(leaf, dtypes[path]) for path, leaf in flatten(base).items()})
