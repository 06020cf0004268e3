"""Weights that stay frozen beneath adapters, in 4 or 8 bits each (QLoRA, Dettmers et al. 2023).

Along its last axis a weight is cut into blocks, and each block has one scale, a bfloat16:

- nf4: a value is one of 16 levels times the scale, which is the block's largest magnitude. The levels are
  quantiles of a normal distribution. Two codes share a byte, the one at the even index in its lower half.
- int8: a value is an integer from -127 to 127 times the scale, which is the largest magnitude over 127.

Every block is quantized on its own, so a weight cut along any axis but the last (or along the last at a
multiple of the block) has the codes and scales of the whole one, cut the same way.
"""

import math
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

KINDS = ("nf4", "int8")
BLOCK = 64  # values with one scale, as in the paper
SMALLEST_BLOCK = 8  # below it the scales weigh as much as the nf4 codes
_MAX_SCALE = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)  # the largest float32 values would round to infinity
_MIN_SCALE = float(np.finfo(np.float32).tiny)  # devices take smaller ones for 0, so a block of them is zeros
_CHUNK = 1 << 20  # values that numpy works on at a time: what it makes on the way is several times the result


def _nf4_levels() -> np.ndarray:
    """Return the 16 levels of appendix E: normal quantiles at even steps, 8 above 0 and 7 below, scaled to [-1, 1].

    The outermost probability is the mean of 1 - 1/30 and 1 - 1/32: half a step short of 1 on either side.
    """
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    above, below = (
        [NormalDist().inv_cdf(float(p)) for p in np.linspace(0.5, outermost, number + 1)[1:]] for number in (8, 7)
    )
    levels = np.array([*(-x for x in reversed(below)), 0.0, *above])
    return (levels / levels.max()).astype(np.float32)


NF4_LEVELS = _nf4_levels()
_NF4_BORDERS = ((NF4_LEVELS[1:].astype(np.float64) + NF4_LEVELS[:-1]) / 2).astype(np.float32)


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scales"], meta_fields=["kind"])
@dataclass(frozen=True)
class Quantized:
    """A weight [..., n] in blocks along its last axis; a pytree whose arrays keep the leading axes.

    `codes` is uint8 [..., n / 2] for nf4 and int8 [..., n] for int8, `scales` bfloat16 [..., n / block].
    """

    codes: Any
    scales: Any
    kind: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        *leading, last = self.codes.shape
        return (*leading, last * (2 if self.kind == "nf4" else 1))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of codes and scales together."""
        return self.codes.nbytes + self.scales.nbytes

    def dequantize(self, dtype: Any) -> jax.Array:
        """Return the weight [..., n] in `dtype`: level times scale, computed in float32 and rounded once."""
        codes = jnp.asarray(self.codes)
        if self.kind == "nf4":
            # Each byte twice, then the half that each is for: faster than to stack halves, and nothing is kept.
            shifts = jnp.arange(self.shape[-1], dtype=jnp.uint8) % 2 * 4
            values = _levels_of(jnp.repeat(codes, 2, axis=-1) >> shifts & 15)
        else:
            values = codes.astype(jnp.float32)
        scales = jnp.asarray(self.scales).astype(jnp.float32)
        blocks = values.reshape(*scales.shape, -1) * scales[..., None]
        return blocks.reshape(self.shape).astype(dtype)


def block_size(n: int) -> int:
    """Return the largest power of 2 up to 64 that divides a last axis of `n` values, or 0 where that is below 8.

    A weight without a block is best left as it is: its scales would outweigh what the codes save.
    """
    block = math.gcd(n, BLOCK)
    return block if block >= SMALLEST_BLOCK else 0


def quantize(array: Any, kind: str) -> Quantized:
    """Quantize a float array [..., n] as `kind`, each value to the nearest: of numpy in numpy, of JAX in JAX.

    The scale is rounded to bfloat16 before codes are chosen, so that these are best for the scale that is
    kept. A value is off by half the widest gap between levels at most (0.14 of the scale for nf4, 0.5 of it
    for int8), and a block of zeros gives zeros.

    Raises ValueError for an unknown kind, an axis that `block_size` gives no block for, and values that
    are not finite; under jit these can't be seen, and make their whole block NaN.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r} of quantized weights; there are: {', '.join(KINDS)}")
    block = block_size(array.shape[-1]) if array.ndim else 0
    if not block:
        raise ValueError(
            f"a weight of shape {tuple(array.shape)} can't be quantized: "
            f"its last axis must be a multiple of {SMALLEST_BLOCK}"
        )
    if isinstance(array, jax.Array):
        quantized = _quantize_jax(array, kind, block)
        if not isinstance(array, jax.core.Tracer):
            _check_finite(quantized.scales)
        return quantized
    return _quantize_numpy(np.asarray(array), kind, block)


@partial(jax.jit, static_argnums=(1, 2))
def _quantize_jax(array: jax.Array, kind: str, block: int) -> Quantized:
    blocks = array.astype(jnp.float32).reshape(*array.shape[:-1], -1, block)
    largest = jnp.abs(blocks).max(-1)
    raw = largest if kind == "nf4" else largest * np.float32(1 / 127)
    # A cast to bfloat16 and back may be optimised away (XLA allows excess precision); this may not.
    scales = jax.lax.reduce_precision(raw, exponent_bits=8, mantissa_bits=7)
    scales = jnp.where(scales < _MIN_SCALE, 0, jnp.minimum(scales, _MAX_SCALE))
    scales = jnp.where(jnp.isfinite(largest), scales, jnp.nan)
    divisors = jnp.where(scales == 0, 1, scales)[..., None]
    if kind == "nf4":
        codes = sum((blocks > border * divisors).astype(jnp.uint8) for border in _NF4_BORDERS)
        codes = codes.reshape(*array.shape[:-1], -1, 2)
        codes = codes[..., 0] | codes[..., 1] << 4
    else:
        codes = jnp.clip(jnp.round(blocks * (1 / divisors)), -127, 127).astype(jnp.int8).reshape(array.shape)
    return Quantized(codes, scales.astype(jnp.bfloat16), kind)


def _quantize_numpy(array: np.ndarray, kind: str, block: int) -> Quantized:
    flat = array.reshape(-1, block)
    codes = np.empty((len(flat), block // 2), np.uint8) if kind == "nf4" else np.empty(flat.shape, np.int8)
    scales = np.empty(len(flat), ml_dtypes.bfloat16)
    rows = _CHUNK // block
    for i in range(0, len(flat), rows):
        blocks = flat[i : i + rows].astype(np.float32)
        largest = np.abs(blocks).max(-1)
        _check_finite(largest)
        raw = largest if kind == "nf4" else largest * np.float32(1 / 127)
        with np.errstate(over="ignore"):
            rounded = np.minimum(raw.astype(ml_dtypes.bfloat16).astype(np.float32), np.float32(_MAX_SCALE))
        rounded[rounded < _MIN_SCALE] = 0
        scales[i : i + rows] = rounded
        divisors = np.where(rounded == 0, np.float32(1), rounded)[:, None]
        if kind == "nf4":
            found = np.zeros(blocks.shape, np.uint8)
            for border in _NF4_BORDERS:
                found += blocks > border * divisors
            codes[i : i + rows] = found[:, 0::2] | found[:, 1::2] << 4
        else:
            codes[i : i + rows] = np.clip(np.round(blocks * (1 / divisors)), -127, 127)
    *leading, n = array.shape
    return Quantized(codes.reshape(*leading, -1), scales.reshape(*leading, n // block), kind)


def _check_finite(of_blocks: Any) -> None:
    """Raise ValueError unless the scales, or the largest magnitudes, of all blocks are finite."""
    if not np.isfinite(np.asarray(of_blocks, np.float32)).all():
        raise ValueError("a weight that holds NaN or infinity can't be quantized")


def _levels_of(codes: jax.Array) -> jax.Array:
    """Return the level of each code, picked by halving the list of them at each bit.

    A gather is slow on some devices, and `jnp.where` makes an array as large as the weight of every level,
    which the gradient of a scan takes out of its loop and keeps: here levels are scalars, as integers of the same bits.
    """
    levels: list[Any] = list(NF4_LEVELS.view(np.int32))
    for bit in range(4):
        mask = -(codes >> bit & 1).astype(jnp.int32)  # all bits 1, or none
        levels = [low ^ (low ^ high) & mask for low, high in zip(levels[::2], levels[1::2], strict=True)]
    return jax.lax.bitcast_convert_type(levels[0], jnp.float32)
