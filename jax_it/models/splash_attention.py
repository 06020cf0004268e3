"""Causal attention of packed rows in one kernel on TPUs, whose scores never reach memory: JAX's splash attention."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_it import sharding

LANES = 128  # of a TPU's vectors: the kernel's lengths and head dimensions are multiples
BLOCK = 512  # positions of queries and of keys that it takes at a time


def fits(length: int, num_heads: int, num_kv_heads: int, head_dim: int) -> bool:
    """Return whether the kernel can compute such rows on the mesh of `jax.set_mesh`."""
    split = sharding.parts_of("N")
    by_head = split == 1 or (num_kv_heads % split == 0 and num_heads % split == 0)
    return length % LANES == 0 and head_dim % LANES == 0 and by_head and sharding.parts_of("T") == 1


def attend(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    segments_BT: jax.Array,
    *,
    window: int = 0,
    scale: float = 1.0,
    softcap: float = 0.0,
    interpret: bool = False,
) -> jax.Array:
    """Attend as `fast_attention.attend` does, causally, within segments and, unless it is 0, within a window."""
    mesh = jax.sharding.get_abstract_mesh()

    def own(query_BTNH: jax.Array, key_BSKH: jax.Array, value_BSKH: jax.Array, segments_BT: jax.Array) -> jax.Array:
        from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import, and for TPUs alone

        length, heads = query_BTNH.shape[1:3]
        kernel = _kernel(length, heads, window, softcap, interpret)
        by_head = (jnp.swapaxes(x, 1, 2) for x in (query_BTNH, key_BSKH, value_BSKH))
        attended_BNTH = jax.vmap(kernel)(*by_head, splash.SegmentIds(segments_BT, segments_BT))
        return jnp.swapaxes(attended_BNTH, 1, 2)

    query_BTNH = query_BTNH * jnp.asarray(scale, query_BTNH.dtype)  # the kernel has no scale of its own
    arrays = query_BTNH, key_BSKH, value_BSKH, segments_BT
    if mesh.empty or mesh.size == 1:
        return own(*arrays)
    names = ("B T N H", "B S K H", "B S K H", "B T")
    specs = tuple(sharding.spec(name, array.shape, mesh) for name, array in zip(names, arrays, strict=True))
    return jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def _kernel(length: int, heads: int, window: int, softcap: float, interpret: bool) -> Callable[..., jax.Array]:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = (length, length)
    mask: splash.Mask = splash.LocalMask(shape, (window - 1, 0), 0) if 0 < window < length else splash.CausalMask(shape)
    block = next(size for size in (BLOCK, 256, LANES) if length % size == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    return splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        attn_logits_soft_cap=softcap or None,
        interpret=interpret,
    )
