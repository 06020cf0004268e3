"""Token losses, each a sum and a weight: they are divided once, over everything, by the training step.

Logits are computed in chunks of the target's positions, so that no [B, T, V] array is ever in memory.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jax_it import sharding

TokenLoss = Callable[[jax.Array, jax.Array], jax.Array]  # float32 logits_BTV, targets_BT -> losses_BT


def cross_entropy(
    logits_BTV: jax.Array, targets_BT: jax.Array, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> jax.Array:
    """Return the cross-entropy, in nats a token, [B, T].

    Label smoothing mixes the target with the uniform distribution, as `torch.nn.CrossEntropyLoss`
    does; `z_loss` times the squared log of the softmax's denominator keeps that near 0 (PaLM, T5X).
    """
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    loss_BT = log_z_BT - jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    if label_smoothing:
        uniform_BT = log_z_BT - logits_BTV.mean(-1)
        loss_BT = (1 - label_smoothing) * loss_BT + label_smoothing * uniform_BT
    if z_loss:
        loss_BT += z_loss * jnp.square(log_z_BT)
    return loss_BT


def squared_error(logits_BTV: jax.Array, targets_BT: jax.Array, *, scale: float, target: float) -> jax.Array:
    """Return the squared error on the logits, [B, T] (Hui & Belkin 2020, section 2, rescaled form).

    The mean over the vocabulary of the squared logits, the true class's being
    `scale * (logit - target)**2` instead.
    """
    true_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    others_BT = jnp.square(logits_BTV).sum(-1) - jnp.square(true_BT)
    return (scale * jnp.square(true_BT - target) + others_BT) / logits_BTV.shape[-1]


def chunked_sum(
    loss: TokenLoss,
    logits: Callable[[jax.Array, jax.Array], jax.Array],
    chunk: int,
    head_VD: jax.Array,
    states_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    head_trained: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Return the weighted sum of token losses and the sum of their weights, both float32.

    `logits(head, states)` gives float32 logits. Each device holds logits for at most `chunk` positions (or one per row)
    at a time. Gradients are taken chunk by chunk in the forward pass, so no logits are kept for the backward pass.
    A head that is not trained has none.
    """
    total = _sum_over_chunks(loss, logits, chunk, head_trained, head_VD, states_BTD, targets_BT, weights_BT)
    return total, weights_BT.sum(dtype=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _sum_over_chunks(
    loss: TokenLoss, logits: Callable, chunk: int, head_trained: bool, head_VD: jax.Array, states_BTD: jax.Array,
    targets_BT: jax.Array, weights_BT: jax.Array,
) -> jax.Array:  # fmt: skip
    def value(head_VD: jax.Array, *arrays: jax.Array) -> tuple[jax.Array]:
        def add(total: jax.Array, arrays: tuple) -> tuple[jax.Array, None]:
            return total + _chunk_sum(loss, logits, head_VD, *arrays), None

        return (jax.lax.scan(add, jnp.float32(0), _chunks(chunk, *arrays))[0],)

    return _on_own_positions(value, ("",), head_VD, states_BTD, targets_BT, weights_BT)[0]


def _vjp_forward(
    loss: TokenLoss, logits: Callable, chunk: int, head_trained: bool, head_VD: jax.Array, states_BTD: jax.Array,
    targets_BT: jax.Array, weights_BT: jax.Array,
) -> Any:  # fmt: skip
    """Return the sum, and the gradients for a cotangent of 1: of the states and, if it is trained, of the head."""

    def value_and_gradients(head_VD: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        def add(carry: tuple, part: tuple) -> tuple[tuple, jax.Array]:
            total, head_gradient = carry
            states, targets, weights = part
            value, (for_states, *for_head) = jax.value_and_grad(
                lambda states, head: _chunk_sum(loss, logits, head, states, targets, weights),
                argnums=(0, 1) if head_trained else (0,),
            )(states, head_VD)
            return (total + value, [old + g for old, g in zip(head_gradient, for_head, strict=True)]), for_states

        zeros = [jnp.zeros(head_VD.shape, head_dtype)] if head_trained else []
        (total, head_gradient), chunks = jax.lax.scan(add, (jnp.float32(0), zeros), _chunks(chunk, *arrays))
        length = arrays[0].shape[1]
        for_states = jnp.moveaxis(chunks, 0, 2).reshape(arrays[0].shape[0], -1, arrays[0].shape[2])[:, :length]
        return total, for_states, *head_gradient

    head_dtype = jnp.promote_types(head_VD.dtype, states_BTD.dtype)  # of float32 states and a bfloat16 head: float32
    logical_axes = ("", "B T D", "V D")[: 3 if head_trained else 2]
    total, *gradients = _on_own_positions(
        value_and_gradients, logical_axes, head_VD, states_BTD, targets_BT, weights_BT
    )
    return total, [g.astype(x.dtype) for g, x in zip(gradients, (states_BTD, head_VD), strict=False)]


def _vjp_backward(
    loss: TokenLoss, logits: Callable, chunk: int, head_trained: bool, gradients: list[jax.Array], cotangent: jax.Array
) -> tuple:
    for_states, *for_head = (g * cotangent.astype(g.dtype) for g in gradients)
    return for_head[0] if head_trained else None, for_states, None, None


_sum_over_chunks.defvjp(_vjp_forward, _vjp_backward)


def _chunk_sum(loss: TokenLoss, logits: Callable, head: Any, states: Any, targets: Any, weights: Any) -> jax.Array:
    return jnp.sum(weights * loss(logits(head, states), targets), dtype=jnp.float32)


def _chunks(chunk: int, *arrays_BT: jax.Array) -> tuple[jax.Array, ...]:
    """Cut arrays along T into chunks, the first axis: as few as there may be. Each has every n-th position."""
    rows, length = arrays_BT[0].shape[:2]
    chunks = -(-length // max(1, chunk // rows))

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, -length % chunks), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunks, *x.shape[2:]), 2, 0)

    return tuple(map(cut, arrays_BT))


def _on_own_positions(
    compute: Callable[..., tuple[jax.Array, ...]],
    logical_axes: tuple[str, ...],
    head_VD: jax.Array,
    states_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
) -> tuple[jax.Array, ...]:
    """Call `compute(head, states, targets, weights)` on every device for the positions that it has.

    Results with the axes B and T stay where they are made; others are summed over the devices once, when all chunks are
    done. The head is gathered once: in a loop that XLA partitions it would be for every chunk, and its
    gradient summed over the devices as often.
    """
    head_VD = head_VD.astype(states_BTD.dtype)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return compute(head_VD, states_BTD, targets_BT, weights_BT)
    rows_BT = sharding.spec("B T", targets_BT.shape, mesh)
    split = [axis for entry in rows_BT for axis in sharding.axes_of(entry)]  # over which positions are
    head_D = sharding.axes_of(sharding.spec("V D", head_VD.shape, mesh)[1])
    scattered = tuple(axis for axis in head_D if axis in split)

    def body(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(together(names, value) for names, value in zip(logical_axes, compute(*arrays), strict=True))

    def together(names: str, value: jax.Array) -> jax.Array:
        if names.startswith("B T"):
            return value
        if names == "V D" and scattered:
            value = jax.lax.psum_scatter(value, scattered, scatter_dimension=1, tiled=True)
            return jax.lax.psum(value, tuple(axis for axis in split if axis not in scattered))
        return jax.lax.psum(value, tuple(split))

    specs = {"": PartitionSpec(), "B T D": PartitionSpec(*rows_BT, None), "V D": PartitionSpec(None, scattered)}
    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(PartitionSpec(), specs["B T D"], rows_BT, rows_BT),
        out_specs=tuple(specs[names] for names in logical_axes),
        axis_names=set(sharding.RULES["B"] + sharding.RULES["T"]),  # the vocabulary is split over the rest by XLA
        check_vma=False,
    )(head_VD, states_BTD, targets_BT, weights_BT)
