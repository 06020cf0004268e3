"""Products with weights that may be plain arrays, quantized, or have an adapter beside them.

A module writes `project(x, self.query, "BTD,DNH->BTNH")` and need not know which of them its weight is.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_it.models.dropout import dropout
from jax_it.models.quantized import Quantized

DenseWeight = jax.Array | Quantized

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], stddev: float) -> nnx.Param:
    """Draw a float32 weight from a normal distribution."""
    return nnx.Param(stddev * jax.random.normal(rngs.params(), shape, jnp.float32))


def linear(
    rngs: nnx.Rngs, inputs: tuple[int, ...], outputs: tuple[int, ...], bias: bool, scale: float = 1
) -> tuple[nnx.Param, nnx.Param | None]:
    """Draw a linear layer's weight [*inputs, *outputs], for outputs of about `scale`; its bias, if it has one, is 0."""
    weight = normal(rngs, (*inputs, *outputs), math.prod(inputs) ** -0.5 * scale)
    return weight, nnx.Param(jnp.zeros(outputs)) if bias else None


def scale_by(x: jax.Array, factor: float) -> jax.Array:
    """Multiply by a constant that is not rounded to `x`'s dtype, as PyTorch does."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapted:
    """A frozen weight with a low-rank adapter: W + scale * A B, or DoRA's columns of that, scaled to `magnitude`.

    For a weight with the axes (inputs, outputs), A is [inputs, R], B is [R, outputs] and the magnitude
    [outputs]; a stack of layers has L before them all.
    """

    base: Any  # a DenseWeight
    a: jax.Array
    b: jax.Array
    magnitude: jax.Array | None
    key: jax.Array | None  # of the dropout of the adapter's input; None: no dropout
    scale: float = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})


def project(x: jax.Array, param: nnx.Param, spec: str, bias: nnx.Param | None = None) -> jax.Array:
    """Return `einsum(spec, x, weight) + bias` for the param's weight, in `x`'s dtype."""
    out = _project(x, param.get_value(), spec)
    return out if bias is None else out + bias[...].astype(x.dtype)


def _project(x: jax.Array, weight: Any, spec: str) -> jax.Array:
    if not isinstance(weight, Adapted):
        return _product(x, weight, spec)
    dropped = x if weight.key is None else dropout(x, weight.dropout, weight.key)
    down, up = _low_rank_specs(spec)
    added = jnp.einsum(up, jnp.einsum(down, dropped, weight.a.astype(x.dtype)), weight.b.astype(x.dtype))
    added *= jnp.asarray(weight.scale, x.dtype)
    plain = _product(x, weight.base, spec)
    if weight.magnitude is None:
        return plain + added
    # Liu et al. 2024, section 4.3: the norm is a constant to the gradient. As in PEFT, dropout acts on the
    # whole of what the adapter changes.
    inputs, _ = _axes(spec)
    norm = jax.lax.stop_gradient(column_norm(sum_of(weight, inputs), inputs))
    share = weight.magnitude / norm
    changed = plain if weight.key is None else _product(dropped, weight.base, spec)
    # The difference from 1 is small: it is taken before the share is rounded.
    return plain + (share - 1).astype(x.dtype) * changed + share.astype(x.dtype) * added


def _product(x: jax.Array, weight: DenseWeight, spec: str) -> jax.Array:
    if isinstance(weight, Quantized):
        # Dequantized once more for the gradient: else every layer's float weight would wait for it.
        return jax.checkpoint(lambda x, weight: jnp.einsum(spec, x, dense(weight, x.dtype)))(x, weight)
    return _einsum(spec, x, dense(weight, x.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum(spec: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """Do as `jnp.einsum`, with a gradient of the weight that is computed as it is laid out.

    JAX computes it transposed, and a CPU then takes 1.4 times as long.
    """
    return jnp.einsum(spec, x, weight)


def _einsum_backward(spec: str, arrays: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple:
    x, weight = arrays
    (in_x, in_weight), out = (part.split(",") for part in spec.split("->"))
    for_x = jnp.einsum(f"{out[0]},{in_weight}->{in_x}", gradient, weight)
    return for_x, jnp.einsum(f"{in_x},{out[0]}->{in_weight}", x, gradient)


_einsum.defvjp(lambda spec, *arrays: (jnp.einsum(spec, *arrays), arrays), _einsum_backward)


def dense(weight: DenseWeight, dtype: Any) -> jax.Array:
    """Return the weight as an array of this dtype."""
    return weight.dequantize(dtype) if isinstance(weight, Quantized) else weight.astype(dtype)


def look_up(param: nnx.Param, tokens: jax.Array, dtype: Any) -> jax.Array:
    """Return the rows of an embedding [V, D] for the tokens."""
    return param.get_value()[tokens].astype(dtype)


def column_norm(weight: DenseWeight, inputs: int) -> jax.Array:
    """Return the length of a weight along its first `inputs` axes, float32: what DoRA's magnitude starts from."""
    return jnp.sqrt(jnp.square(dense(weight, jnp.float32)).sum(tuple(range(inputs))))


def sum_of(weight: Adapted, inputs: int) -> jax.Array:
    """Return W + scale * A B in float32, for a weight without an axis L whose first `inputs` axes are inputs."""
    product = jnp.tensordot(weight.a.astype(jnp.float32), weight.b.astype(jnp.float32), 1)
    return dense(weight.base, jnp.float32) + weight.scale * product


def merge(weight: Adapted, inputs: int) -> jax.Array:
    """Return the one float32 array that computes the same, for a weight without an axis L."""
    total = sum_of(weight, inputs)
    if weight.magnitude is None:
        return total
    return total * (weight.magnitude / column_norm(total, inputs))


def _axes(spec: str) -> tuple[int, int]:
    """Return how many axes of a spec's weight are inputs, and how many outputs."""
    (x, weight), _ = (part.split(",") for part in spec.split("->"))
    inputs = sum(letter in x for letter in weight)
    return inputs, len(weight) - inputs


def _low_rank_specs(spec: str) -> tuple[str, str]:
    """Return "BTD,DR->BTR" and "BTR,RNH->BTNH" for "BTD,DNH->BTNH"."""
    operands, out = spec.split("->")
    x, weight = operands.split(",")
    inputs, _ = _axes(spec)
    rows, columns = weight[:inputs], weight[inputs:]
    inner = "".join(letter for letter in x if letter not in rows) + "R"
    return f"{x},{rows}R->{inner}", f"{inner},R{columns}->{out}"
