"""Time of the products of decoding with float32, bfloat16 and int8 weights, as XLA computes them on a CPU.

    python bench/int8.py [--rows 1,8] [--rounds 6]

All weights of 32 feed-forward layers of SmolLM2-135M's size, each its own array, times one to a few rows, one after
another: reading the weights is what decoding few texts is bound by. int8 has one scale for each output: with rows in
float32 (weights dequantized before the product, or within a sum that fuses with it) or quantized too.
"""

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from measure import alternate, machine, ratio, timed

D, F, L = 576, 1536, 32


def quantize(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    scales = jnp.abs(x).max(axis, keepdims=True) / 127
    return jnp.round(x / scales).astype(jnp.int8), scales


def plain(x_BD: jax.Array, weights: Any) -> jax.Array:
    (w_DF,) = weights
    return jnp.dot(x_BD.astype(w_DF.dtype), w_DF, preferred_element_type=jnp.float32)


def dequantized(x_BD: jax.Array, weights: Any) -> jax.Array:
    codes_DF, scales_1F = weights
    return (x_BD @ codes_DF.astype(jnp.float32)) * scales_1F


def fused_sum(x_BD: jax.Array, weights: Any) -> jax.Array:
    codes_DF, scales_1F = weights
    return (x_BD[:, :, None] * codes_DF.astype(jnp.float32)).sum(1) * scales_1F


def both_int8(x_BD: jax.Array, weights: Any) -> jax.Array:
    (codes_DF, scales_1F), (row_codes_BD, row_scales_B1) = weights, quantize(x_BD, -1)
    return jnp.dot(row_codes_BD, codes_DF, preferred_element_type=jnp.int32) * scales_1F * row_scales_B1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,8", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    weights = [jax.random.normal(jax.random.key(i), (D, F)) for i in range(L)]
    codes = [quantize(w_DF, 0) for w_DF in weights]
    sides: dict[str, tuple[Any, list[Any]]] = {
        "float32": (plain, [(w_DF,) for w_DF in weights]),
        "bfloat16": (plain, [(w_DF.astype(jnp.bfloat16),) for w_DF in weights]),
        "int8, dequantized": (dequantized, codes),
        "int8, fused sum": (fused_sum, codes),
        "int8 times int8": (both_int8, codes),
    }
    print(machine(), flush=True)
    for rows in options.rows:
        x_BD = jax.random.normal(jax.random.key(L), (rows, D))
        takes = {}
        for name, (product, of_layers) in sides.items():
            compute = jax.jit(lambda x, of_layers, product=product: [product(x, each) for each in of_layers])
            takes[name] = partial(
                timed, partial(lambda f, *args: jax.block_until_ready(f(*args)), compute, x_BD, of_layers)
            )
        alternate(1, takes)
        seconds = alternate(options.rounds, takes)
        for name, found in seconds.items():
            error = max(
                jnp.abs(sides[name][0](x_BD, b) - x_BD @ w).max() / jnp.abs(x_BD @ w).max()
                for b, w in zip(sides[name][1][:2], weights[:2], strict=True)
            )
            best, over = 1e3 * min(each.wall for each in found), ratio(seconds["float32"], found)
            print(f"{rows} rows, {name}: {best:.1f} ms; over float32 {over}; error {error:.1e}", flush=True)


if __name__ == "__main__":
    main()
