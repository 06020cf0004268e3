"""Attention in one kernel on TPUs, forward and backward, whose scores, biases and dropout masks never reach memory.

A Pallas kernel of our own for what JAX's splash attention does not compute: T5's relative bias, dropout, encoders and
cross-attention of packed rows. One program computes a few heads of one row. It holds these whole in the chip's memory
and goes over tiles of scores, keys by queries [S, T], so that what is known of each query (its maximum, its sum) lies
along the lanes of vectors. The backward pass computes the scores again (Dao et al. 2022, "FlashAttention").

- Tiles without a pair of positions that may see each other are skipped: segments and masks bound, for every block of
  queries, the blocks of keys. Padding (segment 0) sees nothing, and its result is 0.
- A relative bias comes as a number per head and distance. The first row of a head makes the tiles of its bias, which
  the other rows use again; they add up the gradient of these tiles, and the last one sums it by distance.
- Dropout takes its bits from a hash of a seed, the row, the head and the two positions. Backward draws the same bits,
  and so does any sharding.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_it import sharding
from jax_it.models.attention import MASKED, Scores
from jax_it.models.dropout import rounded_rate
from jax_it.models.relative_bias import DistanceBias

LANES, SUBLANES = 128, 8  # of a TPU's vectors
BLOCKS = (512, 256, LANES)  # positions of a tile's queries and keys: the largest of which the length is a multiple
MAX_VMEM = 40 << 20  # bytes of a chip's fast memory for one program, of 64 MiB or more
OLD_CHIPS, OLD_MAX_VMEM = ("TPU v2", "TPU v3", "TPU v4"), 16 << 20  # which have no more
SPARE_VMEM = 8 << 20  # beside what `Attended.vmem` counts
NO_KEYS = MASKED / 10  # above a masked score: the exponential of their difference is 0


class Attended(NamedTuple):
    """What one device computes; all of it is static."""

    heads: int  # of queries
    kv_heads: int
    head_dim: int
    queries: int  # T, a multiple of LANES as is S
    keys: int  # S
    causal: bool
    window: int
    scores: Scores  # a dropout of 0 where no key for it is given
    interpret: bool

    @property
    def group(self) -> int:
        """How many heads of queries share a head of keys."""
        return self.heads // self.kv_heads

    @property
    def program_kv_heads(self) -> int:
        """How many heads of keys a program computes: the fewest whose entries fill whole vectors."""
        divisors = (n for n in range(1, self.kv_heads) if self.kv_heads % n == 0)
        return next((n for n in divisors if n * self.head_dim % LANES == 0), self.kv_heads)

    @property
    def program_heads(self) -> int:
        return self.program_kv_heads * self.group

    @property
    def tile(self) -> tuple[int, int]:
        """The keys and the queries of a tile."""
        keys, queries = (next(size for size in BLOCKS if length % size == 0) for length in (self.keys, self.queries))
        return keys, queries

    @property
    def tiles(self) -> tuple[int, int]:
        return self.keys // self.tile[0], self.queries // self.tile[1]

    @property
    def diagonals(self) -> int:
        """How many tiles of a head's bias differ."""
        return self.tiles[0] if self.causal else 2 * self.tiles[0] - 1

    def seen(self) -> np.ndarray:
        """Return which tiles [T, S] hold a pair that the mask allows, whatever the segments are."""
        (keys, queries), (keys_tile, queries_tile) = self.tiles, self.tile
        first = np.arange(queries)[:, None] * queries_tile - (np.arange(keys) + 1) * keys_tile + 1  # the least t - s
        last = first + queries_tile + keys_tile - 2
        limit = self.window or max(self.queries, self.keys)
        return (last >= (0 if self.causal else 1 - limit)) & (first < limit)

    def vmem(self, itemsize: int, bias: bool) -> int:
        """Estimate the bytes that the backward pass of one program needs."""
        tile = 4 * self.tile[0] * self.tile[1]
        queries = self.queries * self.program_heads * self.head_dim
        keys = self.keys * self.program_kv_heads * self.head_dim
        arrays = 2 * 4 * itemsize * (queries + keys) + 2 * 4 * keys  # twice, to load the next row meanwhile; sums
        return arrays + 8 * tile + bias * 2 * self.program_heads * self.diagonals * tile


def describe(
    query_shape: tuple[int, ...], key_shape: tuple[int, ...], *, scores: Scores, causal: bool, window: int = 0,
    interpret: bool = False,
) -> Attended:  # fmt: skip
    """Return what a device computes of queries [B, T, N, H] and keys [B, S, K, H] with these shapes on it."""
    queries, keys = (-(-length // LANES) * LANES for length in (query_shape[1], key_shape[1]))
    heads, head_dim = query_shape[2:]
    return Attended(heads, key_shape[2], head_dim, queries, keys, causal, window, scores, interpret)


def fits(query_BTNH: jax.Array, key_BSKH: jax.Array, *, bias: bool, causal: bool) -> bool:
    """Return whether the kernel can compute such rows on the mesh of `jax.set_mesh`."""
    split, (heads, kv_heads) = sharding.parts_of("N"), (query_BTNH.shape[2], key_BSKH.shape[2])
    if sharding.parts_of("T") > 1 or (split > 1 and (heads % split or kv_heads % split)):
        return False
    mesh = jax.sharding.get_abstract_mesh()
    chip = jax.devices()[0] if mesh.empty or not mesh.abstract_device else mesh.abstract_device
    limit = OLD_MAX_VMEM if chip.device_kind.startswith(OLD_CHIPS) else MAX_VMEM
    per_device = ((*x.shape[:2], x.shape[2] // split, x.shape[3]) for x in (query_BTNH, key_BSKH))
    return describe(*per_device, scores=Scores(), causal=causal).vmem(query_BTNH.dtype.itemsize, bias) <= limit


def attend(
    query_BTNH: jax.Array, key_BSKH: jax.Array, value_BSKH: jax.Array, scores: Scores, segments_BT: jax.Array,
    key_segments_BS: jax.Array, *, causal: bool = False, window: int = 0, bias: DistanceBias | None = None,
    dropout_key: jax.Array | None = None, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """Attend as `fast_attention.attend` does, within segments; padding, whose segment is 0, gets zeros.

    With causal attention, a window or a bias, queries and keys are the same positions.
    """
    assert query_BTNH.shape[1] == key_BSKH.shape[1] or not (causal or window or bias)
    if dropout_key is None or not scores.dropout:
        scores, seed = scores._replace(dropout=0.0), jnp.zeros(2, jnp.int32)
    else:
        seed = lax.bitcast_convert_type(jax.random.bits(dropout_key, (2,), jnp.uint32), jnp.int32)
    arrays = [query_BTNH, key_BSKH, value_BSKH, segments_BT, key_segments_BS, seed]
    names = ["B T N H", "B S K H", "B S K H", "B T", "B S", "Z"]
    if bias is not None:
        arrays, names = [*arrays, bias.values_NZ], [*names, "N Z"]
    make = partial(describe, scores=scores, causal=causal, window=window, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _attend_on_device(make(query_BTNH.shape, key_BSKH.shape), [0, 0], *arrays)
    specs = tuple(sharding.spec(name, array.shape, mesh) for name, array in zip(names, arrays, strict=True))

    def own(*arrays: jax.Array) -> jax.Array:
        shape, first = arrays[0].shape, []
        for axis in (0, 2):
            split = sharding.axes_of(specs[0][axis])
            first.append(lax.axis_index(split) * shape[axis] if split else 0)
        return _attend_on_device(make(shape, arrays[1].shape), first, *arrays)

    return jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def _attend_on_device(
    a: Attended, first: Sequence[jax.Array | int], query_BTNH: jax.Array, key_BSKH: jax.Array, value_BSKH: jax.Array,
    segments_BT: jax.Array, key_segments_BS: jax.Array, seed: jax.Array, bias_NZ: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Attend from a device's rows and heads, of which `first` are the row and the head: dropout depends on these."""
    rows, length = segments_BT.shape

    def padded(x: jax.Array, length: int) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, length - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])

    def joined(x: jax.Array, length: int) -> jax.Array:
        """Join the axes of heads and their entries, which then fill whole vectors in memory."""
        return padded(x.reshape(rows, x.shape[1], -1), length)

    segments_BT, key_segments_BS = padded(segments_BT, a.queries), padded(key_segments_BS, a.keys)
    bounds = (x.ravel() for x in _key_blocks(a, segments_BT, key_segments_BS))
    scalars = jnp.concatenate([seed, jnp.asarray(first), *bounds])
    arrays = _Arrays(
        joined(query_BTNH, a.queries), joined(key_BSKH, a.keys), joined(value_BSKH, a.keys),
        segments_BT.reshape(rows, a.tiles[1], 1, -1),
        jnp.where(key_segments_BS > 0, key_segments_BS, -1).reshape(rows, a.tiles[0], 1, -1),  # padding sees none
        () if bias_NZ is None else (_by_query_minus_key(bias_NZ, a.queries),),
    )  # fmt: skip
    attended = _flash(a, scalars.astype(jnp.int32), arrays)
    return attended[:, :length].reshape(query_BTNH.shape)


def _key_blocks(a: Attended, segments_BT: jax.Array, key_segments_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the first and the last + 1 of the blocks of keys that each block of queries may see: [B, blocks of T]."""

    def ranges(segments: jax.Array, blocks: int) -> tuple[jax.Array, jax.Array]:
        """Return the lowest and the highest segment of each block, padding aside."""
        segments = segments.reshape(len(segments), blocks, -1)
        return jnp.where(segments > 0, segments, np.iinfo(np.int32).max).min(-1), segments.max(-1)

    key_blocks, query_blocks = a.tiles
    low, high = (x[:, :, None] for x in ranges(segments_BT, query_blocks))
    key_low, key_high = (x[:, None] for x in ranges(key_segments_BS, key_blocks))
    seen = a.seen() & (low <= key_high) & (key_low <= high)  # [B, blocks of T, blocks of S]
    first, end = seen.argmax(-1), key_blocks - seen[..., ::-1].argmax(-1)
    return first, jnp.where(seen.any(-1), end, first)


def _by_query_minus_key(bias_NZ: jax.Array, length: int) -> jax.Array:
    """Return a bias, given by key minus query, by query minus key: -length … length - 1. The result is [N, 1, Z]."""
    half = bias_NZ.shape[1] // 2
    descending_NZ = jnp.roll(bias_NZ, half, axis=1)[:, :0:-1]  # without the lowest distance, which does not occur
    return jnp.pad(descending_NZ, ((0, 0), (length - half + 1, length - half)))[:, None]


class _Arrays(NamedTuple):
    """What a program reads: arrays, how they are cut into the parts of programs, or these parts."""

    query: Any  # [B, T, C]
    key: Any  # [B, S, C]
    value: Any
    segments: Any  # [B, blocks of T, 1, …]: a block's positions lie along the lanes
    key_segments: Any
    bias: tuple[Any, ...]  # [N, 1, Z] by query minus key, if there is one


class _Results(NamedTuple):
    """What the forward pass gives, cut as `_Arrays` are."""

    attended: Any  # [B, T, C]
    lse: Any  # [B, N, blocks of T, 1, …]: the logarithm of each query's sum of exponentials


def _cut(a: Attended, bias: bool) -> tuple[_Arrays, _Results]:
    """Return how arrays are cut: a program has some heads of a row. All rows come before the next heads."""
    (keys, queries), (keys_tile, queries_tile) = a.tiles, a.tile
    heads, kv_heads = a.program_heads, a.program_kv_heads
    by_query = pl.BlockSpec((1, a.queries, heads * a.head_dim), lambda h, b, _: (b, 0, h))
    by_key = pl.BlockSpec((1, a.keys, kv_heads * a.head_dim), lambda h, b, _: (b, 0, h))
    by_distance = pl.BlockSpec((heads, 1, 2 * a.queries), lambda h, b, _: (h, 0, 0))
    return (
        _Arrays(
            by_query, by_key, by_key,
            pl.BlockSpec((1, queries, 1, queries_tile), lambda h, b, _: (b, 0, 0, 0)),
            pl.BlockSpec((1, keys, 1, keys_tile), lambda h, b, _: (b, 0, 0, 0)),
            (by_distance,) * bias,
        ),
        _Results(by_query, pl.BlockSpec((1, heads, queries, 1, queries_tile), lambda h, b, _: (b, h, 0, 0, 0))),
    )  # fmt: skip


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(a: Attended, scalars: jax.Array, arrays: _Arrays) -> jax.Array:
    """Attend, and return [B, T, C]: an operation with a derivative of its own."""
    return _forward(a, scalars, arrays).attended


def _flash_forward(a: Attended, scalars: jax.Array, arrays: _Arrays) -> tuple[jax.Array, Any]:
    results = _forward(a, scalars, arrays)
    return results.attended, (scalars, arrays, results)


def _flash_backward(a: Attended, kept: Any, gradient_BTC: jax.Array) -> tuple[None, _Arrays]:
    scalars, arrays, results = kept
    return None, _backward(a, scalars, arrays, results, gradient_BTC)


_flash.defvjp(_flash_forward, _flash_backward)


def _forward(a: Attended, scalars: jax.Array, arrays: _Arrays) -> _Results:
    cut, results_cut = _cut(a, bool(arrays.bias))
    results = _Results(
        jax.ShapeDtypeStruct(arrays.query.shape, arrays.value.dtype),
        jax.ShapeDtypeStruct((len(arrays.query), a.heads, a.tiles[1], 1, a.tile[1]), jnp.float32),
    )
    scratch = [_bias_tiles(a)] if arrays.bias else []
    return _call(a, _forward_kernel, 2, scalars, (arrays,), (cut,), results, results_cut, scratch)


def _backward(a: Attended, scalars: jax.Array, arrays: _Arrays, results: _Results, gradient_BTC: jax.Array) -> _Arrays:
    """Return the gradients of what the forward pass read."""
    cut, results_cut = _cut(a, bool(arrays.bias))
    sums = pltpu.VMEM((a.keys, a.program_kv_heads * a.head_dim), jnp.float32)
    scratch = [sums, sums, *([_bias_tiles(a)] * 2 if arrays.bias else [])]
    inputs, input_cuts = (arrays, results, gradient_BTC), (cut, results_cut, results_cut.attended)
    outputs, output_cuts = (x._replace(segments=(), key_segments=()) for x in (arrays, cut))
    found = _call(a, _backward_kernel, 5, scalars, inputs, input_cuts, outputs, output_cuts, scratch)
    return found._replace(segments=None, key_segments=None)  # which have no gradient


def _bias_tiles(a: Attended) -> Any:
    return pltpu.VMEM((a.program_heads, a.diagonals, *a.tile), jnp.float32)


def _call(
    a: Attended, kernel: Callable[..., None], products: int, scalars: jax.Array, inputs: tuple[Any, ...],
    input_cuts: tuple[Any, ...], outputs: Any, output_cuts: Any, scratch: list[Any],
) -> Any:  # fmt: skip
    """Run a kernel that computes this many matrix products of each tile. `outputs` are like what it returns."""
    query_BTC, bias = inputs[0].query, inputs[0].bias
    # As many as the masks allow; how many of them segments skip is not known.
    scores = len(query_BTC) * a.heads * int(a.seen().sum()) * math.prod(a.tile)
    moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((inputs, outputs)))
    (found,) = pl.pallas_call(
        partial(kernel, a),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(a.heads // a.program_heads, len(query_BTC)), in_specs=input_cuts,
            out_specs=(output_cuts,), scratch_shapes=scratch,
        ),
        out_shape=(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), outputs),),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=a.vmem(query_BTC.dtype.itemsize, bool(bias)) + SPARE_VMEM,
        ),
        cost_estimate=pl.CostEstimate(2 * products * a.head_dim * scores, scores, moved),
        interpret=a.interpret,
        name=f"flash_attention{kernel.__name__.removesuffix('_kernel')}",
    )(scalars, *inputs)  # fmt: skip
    return found


class _Program(NamedTuple):
    """Which row and heads a program computes, and the scalars that `_attend_on_device` makes."""

    a: Attended
    scalars_ref: Any
    heads: jax.Array  # which of the parts of a row's heads
    row: jax.Array
    rows: jax.Array | int

    def key_blocks(self, query_block: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the bounds of the blocks of keys that a block of queries may see."""
        blocks = self.a.tiles[1]
        at = 4 + self.row * blocks + query_block
        return self.scalars_ref[at], self.scalars_ref[at + self.rows * blocks]

    def tile(self, refs: _Arrays, key_block: jax.Array, query_block: jax.Array) -> "_Tile":
        a = self.a
        keys, queries = a.tile
        # Each key's segment along the lanes: TPUs turn whole vectors. One column of it is read.
        key_segment_S1 = jnp.broadcast_to(refs.key_segments[0, key_block], (LANES, keys)).T[:, :1]
        allowed_ST = key_segment_S1 == refs.segments[0, query_block]
        if a.causal or a.window:
            key_ST, query_ST = (lax.broadcasted_iota(jnp.int32, (keys, queries), axis) for axis in (0, 1))
            distance_ST = query_ST - key_ST + (query_block * queries - key_block * keys)
            if a.causal:
                allowed_ST &= distance_ST >= 0
            if a.window:
                allowed_ST &= (distance_ST if a.causal else jnp.abs(distance_ST)) < a.window
        return _Tile(self, refs, key_block, query_block, allowed_ST)


class _Tile(NamedTuple):
    """A tile of scores [S, T], and what of it all heads have in common."""

    program: _Program
    refs: _Arrays
    key_block: jax.Array
    query_block: jax.Array
    allowed_ST: jax.Array

    @property
    def diagonal(self) -> jax.Array:
        """Which of a head's tiles of biases this one adds."""
        return self.key_block - self.query_block + self.program.a.tiles[0] - 1

    def scores(self, head: int, bias_tiles_ref: Any | None) -> tuple[jax.Array, jax.Array | None]:
        """Return one head's scores, MASKED where not allowed, and the soft cap's hyperbolic tangent, if it has one."""
        a, tanh_ST = self.program.a, None
        scores = a.scores
        key_SH = _block(a, self.refs.key, 0, self.key_block, head // a.group)
        scores_ST = _dot(key_SH, _block(a, self.refs.query, 1, self.query_block, head), (1, 1))
        if scores.scale != 1:
            scores_ST *= scores.scale
        if scores.softcap:
            tanh_ST = jnp.tanh(scores_ST * (1 / scores.softcap))
            scores_ST = scores.softcap * tanh_ST
        if bias_tiles_ref is not None:
            scores_ST += bias_tiles_ref[head, self.diagonal]
        return jnp.where(self.allowed_ST, scores_ST, MASKED), tanh_ST

    def dropout(self, head: int, x_ST: jax.Array) -> jax.Array:
        """Apply dropout to one head's weights, or to their gradients."""
        a, scalars_ref = self.program.a, self.program.scalars_ref
        if not a.scores.dropout:
            return x_ST
        size, dropped = rounded_rate(a.scores.dropout)
        row = scalars_ref[2] + self.program.row
        head = scalars_ref[3] + self.program.heads * a.program_heads + head
        first = self.key_block * (a.tile[0] * size // 32), self.query_block * a.tile[1]
        words = random_words(scalars_ref[0], scalars_ref[1], row, head, size, first, a.tile, a.queries)
        return jnp.where(kept(words, size, dropped), x_ST * (2**size / (2**size - dropped)), 0.0)


_Sums = tuple[jax.Array, jax.Array, jax.Array]  # each query's largest score [1, T], sum [1, T] and result [H, T] so far


def _forward_kernel(
    a: Attended, scalars_ref: Any, refs: _Arrays, results: _Results, bias_tiles_ref: Any | None = None
) -> None:
    program = _Program(a, scalars_ref, pl.program_id(0), pl.program_id(1), pl.num_programs(1))
    if bias_tiles_ref is not None:
        pl.when(program.row == 0)(lambda: _make_bias_tiles(a, refs.bias[0], bias_tiles_ref))

    def attend(i: jax.Array, _: None) -> None:
        """Attend from a block of queries."""

        def add_tile(j: jax.Array, sums: list[_Sums]) -> list[_Sums]:
            tile, new = program.tile(refs, j, i), list[_Sums]()
            for head, (max_1T, sum_1T, attended_HT) in enumerate(sums):
                scores_ST, _ = tile.scores(head, bias_tiles_ref)
                new_max_1T = jnp.maximum(max_1T, scores_ST.max(0, keepdims=True))
                powers_ST, factor_1T = jnp.exp(scores_ST - new_max_1T), jnp.exp(max_1T - new_max_1T)
                sum_1T = factor_1T * sum_1T + powers_ST.sum(0, keepdims=True)
                value_SH = _block(a, refs.value, 0, j, head // a.group)
                powers_ST = tile.dropout(head, powers_ST).astype(value_SH.dtype)
                new.append((new_max_1T, sum_1T, factor_1T * attended_HT + _dot(value_SH, powers_ST, (0, 0))))
            return new

        zeros_1T, zeros_HT = (jnp.zeros((size, a.tile[1]), jnp.float32) for size in (1, a.head_dim))
        start = [(zeros_1T + NO_KEYS, zeros_1T, zeros_HT)] * a.program_heads
        attended = []
        for head, (max_1T, sum_1T, attended_HT) in enumerate(lax.fori_loop(*program.key_blocks(i), add_tile, start)):
            sum_1T = jnp.where(sum_1T > 0, sum_1T, 1.0)  # 0: padding, which sees nothing
            results.lse[0, head, i] = max_1T + jnp.log(sum_1T)
            attended.append(attended_HT / sum_1T)
        results.attended[0, _positions(a, 1, i)] = jnp.concatenate(attended).T.astype(results.attended.dtype)

    lax.fori_loop(0, a.tiles[1], attend, None)


def _backward_kernel(
    a: Attended, scalars_ref: Any, refs: _Arrays, results: _Results, gradient_ref: Any, out: _Arrays,
    key_sum_ref: Any, value_sum_ref: Any, bias_tiles_ref: Any | None = None, bias_sum_ref: Any | None = None,
) -> None:  # fmt: skip
    program = _Program(a, scalars_ref, pl.program_id(0), pl.program_id(1), pl.num_programs(1))
    key_sum_ref[...] = jnp.zeros_like(key_sum_ref)
    value_sum_ref[...] = jnp.zeros_like(value_sum_ref)
    if bias_sum_ref is not None:

        @pl.when(program.row == 0)
        def start() -> None:
            _make_bias_tiles(a, refs.bias[0], bias_tiles_ref)
            bias_sum_ref[...] = jnp.zeros_like(bias_sum_ref)

    def attend(i: jax.Array, _: None) -> None:
        """Add what a block of queries gives to the gradients."""
        # The sum over keys of a query's weights times their gradients: that of its result times its gradient.
        means_1T = []
        for head in range(a.program_heads):
            attended_TH, gradient_TH = (_block(a, ref, 1, i, head) for ref in (results.attended, gradient_ref))
            product_TH = attended_TH.astype(jnp.float32) * gradient_TH.astype(jnp.float32)
            ones = jnp.ones((SUBLANES, a.head_dim), jnp.float32)
            means_1T.append(_dot(ones, product_TH, (1, 1), lax.Precision.HIGHEST)[:1])

        def add_tile(j: jax.Array, sums_HT: list[jax.Array]) -> list[jax.Array]:
            tile, new = program.tile(refs, j, i), []
            for head, sum_HT in enumerate(sums_HT):
                query_TH, gradient_TH = _block(a, refs.query, 1, i, head), _block(a, gradient_ref, 1, i, head)
                key_SH, value_SH = (_block(a, ref, 0, j, head // a.group) for ref in (refs.key, refs.value))
                at = _positions(a, 0, j), _entries(a, head // a.group)
                scores_ST, tanh_ST = tile.scores(head, bias_tiles_ref)
                weights_ST = jnp.exp(scores_ST - results.lse[0, head, i])
                value_sum_ref[at] += _dot(tile.dropout(head, weights_ST).astype(value_SH.dtype), gradient_TH, (1, 0))
                weights_gradient_ST = tile.dropout(head, _dot(value_SH, gradient_TH, (1, 1)))
                gradient_ST = weights_ST * (weights_gradient_ST - means_1T[head])
                if bias_sum_ref is not None:
                    bias_sum_ref[head, tile.diagonal] += gradient_ST
                if tanh_ST is not None:
                    gradient_ST *= 1 - tanh_ST * tanh_ST
                if a.scores.scale != 1:
                    gradient_ST *= a.scores.scale
                gradient_ST = gradient_ST.astype(query_TH.dtype)
                key_sum_ref[at] += _dot(gradient_ST, query_TH, (1, 0))
                new.append(sum_HT + _dot(key_SH, gradient_ST, (0, 0)))
            return new

        zeros = [jnp.zeros((a.head_dim, a.tile[1]), jnp.float32)] * a.program_heads
        sums_HT = lax.fori_loop(*program.key_blocks(i), add_tile, zeros)
        out.query[0, _positions(a, 1, i)] = jnp.concatenate(sums_HT).T.astype(out.query.dtype)

    lax.fori_loop(0, a.tiles[1], attend, None)
    out.key[0] = key_sum_ref[...].astype(out.key.dtype)
    out.value[0] = value_sum_ref[...].astype(out.value.dtype)
    if bias_sum_ref is not None:
        pl.when(program.row == program.rows - 1)(lambda: _sum_bias_tiles(a, bias_sum_ref, out.bias[0]))


def _dot(left: jax.Array, right: jax.Array, axes: tuple[int, int], precision: Any = None) -> jax.Array:
    """Multiply two matrices, summing over an axis of each, to float32."""
    contracted = (axes[:1], axes[1:]), ((), ())
    return lax.dot_general(left, right, contracted, precision=precision, preferred_element_type=jnp.float32)


def _positions(a: Attended, axis: int, block: jax.Array) -> Any:
    """Return the positions of a block of queries (axis 1), or of keys (0)."""
    return pl.ds(pl.multiple_of(block * a.tile[axis], LANES), a.tile[axis])


def _entries(a: Attended, head: int) -> slice:
    """Return where one of a program's heads stands among their joined entries."""
    return slice(head * a.head_dim, (head + 1) * a.head_dim)


def _block(a: Attended, ref: Any, axis: int, block: jax.Array, head: int) -> jax.Array:
    """Return one head of a block of queries (axis 1), or of keys or values (0): [T or S, H]."""
    loaded: jax.Array = ref[0, _positions(a, axis, block), _entries(a, head)]
    return loaded


def _make_bias_tiles(a: Attended, bias_ref: Any, tiles_ref: Any) -> None:
    """Lay out biases by query minus key as tiles: each key's row is that of the key before, moved by one lane."""
    size = a.tile[0]

    for head, diagonal in itertools.product(range(a.program_heads), range(a.diagonals)):
        bias_1Z = bias_ref[head, :, _distances(a, diagonal)]
        rows_8Z = jnp.concatenate([pltpu.roll(bias_1Z, i, 1) for i in range(SUBLANES)])

        def put(i: jax.Array, _: None, at: tuple[int, int], rows_8Z: jax.Array) -> None:
            tiles_ref[*at, _rows(i)] = pltpu.roll(rows_8Z, i * SUBLANES, 1)[:, size:]

        lax.fori_loop(0, size // SUBLANES, partial(put, at=(head, diagonal), rows_8Z=rows_8Z), None)


def _sum_bias_tiles(a: Attended, tiles_ref: Any, bias_ref: Any) -> None:
    """Sum up tiles by query minus key: the transpose of `_make_bias_tiles`."""
    size = a.tile[0]
    bias_ref[...] = jnp.zeros_like(bias_ref)

    for head, diagonal in itertools.product(range(a.program_heads), range(a.diagonals)):

        def add(i: jax.Array, sum_8Z: jax.Array, at: tuple[int, int]) -> jax.Array:
            rows = tiles_ref[*at, _rows(i)]
            rows_8Z = jnp.concatenate([jnp.zeros_like(rows), rows], axis=1)
            return sum_8Z + pltpu.roll(rows_8Z, 2 * size - i * SUBLANES, 1)

        zeros_8Z = jnp.zeros((SUBLANES, 2 * size), jnp.float32)
        sum_8Z = lax.fori_loop(0, size // SUBLANES, partial(add, at=(head, diagonal)), zeros_8Z)
        sums_1Z = (pltpu.roll(sum_8Z[i : i + 1], (2 * size - i) % (2 * size), 1) for i in range(SUBLANES))
        bias_ref[head, :, _distances(a, diagonal)] += sum(sums_1Z)


def _rows(i: jax.Array) -> Any:
    """Return where the vectors of a tile's i-th rows stand."""
    return pl.ds(pl.multiple_of(i * SUBLANES, SUBLANES), SUBLANES)


def _distances(a: Attended, diagonal: int) -> slice:
    """Return where the distances of a tile's bias stand among all: the tile's queries from keys, ± its size."""
    start = (2 * a.tiles[0] - 2 - diagonal) * a.tile[0]
    return slice(start, start + 2 * a.tile[0])


def random_words(
    seed: Any, second_seed: Any, row: Any, head: Any, size: int, first: tuple[Any, Any], shape: tuple[int, int],
    queries: int,
) -> jax.Array:  # fmt: skip
    """Return the random words of a tile of weights [S, T]: int32 [S * size / 32, T].

    A word serves 32 / size keys, which stand 8 apart. `first`: how many words and how many queries of the row come
    before the tile's. A word is a hash of the seed, the row, the head, and the keys' and the
    query's positions among `queries` of a row, and so depends neither on the tile nor on what other devices compute.
    """
    per_word = 32 // size
    keys, length = shape[0] // per_word, shape[1]
    key, second_key = _mix(_mix(seed ^ row) + head), _mix(_mix(second_seed ^ head) + row)
    position = (lax.broadcasted_iota(jnp.int32, (keys, length), 0) + first[0]) * queries
    position += lax.broadcasted_iota(jnp.int32, (keys, length), 1) + first[1]
    return _mix(_mix(position ^ key, rounds=1) + second_key)


def kept(words: jax.Array, size: int, dropped: int) -> jax.Array:
    """Return which weights of a tile [S, T] stay, when `dropped` of the values of `size` bits mean that one goes."""
    keys, length = words.shape
    by_vector = words.reshape(keys // SUBLANES, SUBLANES, length)
    fields = jnp.stack([by_vector << (size * i) for i in range(32 // size)], axis=1).reshape(-1, length)
    # The highest bits of a signed number decide: the lower ones are of other weights, and never change a comparison.
    return fields >= np.int32((dropped - 2 ** (size - 1)) << (32 - size))


def _mix(x: Any, rounds: int = 2) -> Any:
    """Return a hash of int32 numbers (the "lowbias32" of C. Wellons; one round of it is enough before another)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B))[:rounds]:
        x = (x ^ lax.shift_right_logical(x, _int32(shift))) * _int32(factor)
    return x ^ lax.shift_right_logical(x, _int32(16))


def _int32(value: int) -> Any:
    return np.uint32(value).view(np.int32)
