"""Token losses, each a sum and a weight: they are divided once, over everything, by the training step.

Logits are made and used up in chunks of the target's positions, so that no [B, T, V] array lives.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

TokenLoss = Callable[[jax.Array, jax.Array], jax.Array]  # float32 logits_BTV, targets_BT -> losses_BT


def cross_entropy(
    logits_BTV: jax.Array, targets_BT: jax.Array, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> jax.Array:
    """Cross-entropy in nats a token, shape [B, T].

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
    """Squared error on the logits, shape [B, T] (Hui & Belkin 2020, section 2, rescaled form).

    The mean over the vocabulary of the squared logits, the true class's being
    `scale * (logit - target)**2` instead.
    """
    true_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    others_BT = jnp.square(logits_BTV).sum(-1) - jnp.square(true_BT)
    return (scale * jnp.square(true_BT - target) + others_BT) / logits_BTV.shape[-1]


def chunked_sum(
    loss: TokenLoss,
    logits: Callable[[Any, jax.Array], jax.Array],
    chunk: int,
    head: Any,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    head_trained: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of token losses and the sum of their weights, both float32.

    `logits(head, hidden_BCD)` gives float32 logits; at most `chunk` positions of a row have theirs at
    a time. Gradients are taken chunk by chunk in the forward pass: no logits wait for a backward one.
    A head that is not trained has none.
    """
    length = targets_BT.shape[1]
    chunks = -(-length // chunk)
    extra = -length % chunks
    pad = [(0, 0), (0, extra)]
    arrays = (jnp.pad(hidden_BTD, [*pad, (0, 0)]), jnp.pad(targets_BT, pad), jnp.pad(weights_BT, pad))
    split = tuple(jnp.moveaxis(a.reshape(a.shape[0], chunks, -1, *a.shape[2:]), 1, 0) for a in arrays)
    return _sum_over_chunks(loss, logits, head_trained, head, *split), weights_BT.sum(dtype=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sum_over_chunks(
    loss: TokenLoss, logits: Callable, head_trained: bool, head: Any, hidden_XBCD: jax.Array, targets_XBC: jax.Array,
    weights_XBC: jax.Array,
) -> jax.Array:  # fmt: skip
    def add(total: jax.Array, chunk: tuple) -> tuple[jax.Array, None]:
        return total + _chunk_sum(loss, logits, head, *chunk), None

    return jax.lax.scan(add, jnp.float32(0), (hidden_XBCD, targets_XBC, weights_XBC))[0]


def _chunk_sum(loss: TokenLoss, logits: Callable, head: Any, hidden: Any, targets: Any, weights: Any) -> jax.Array:
    return jnp.sum(weights * loss(logits(head, hidden), targets), dtype=jnp.float32)


def _forward(
    loss: TokenLoss, logits: Callable, head_trained: bool, head: Any, hidden: Any, targets: Any, weights: Any
) -> Any:
    def add(carry: tuple, chunk: tuple) -> tuple[tuple, jax.Array]:
        total, head_gradient = carry
        hidden, targets, weights = chunk
        value, (for_hidden, *for_head) = jax.value_and_grad(
            lambda hidden, head: _chunk_sum(loss, logits, head, hidden, targets, weights),
            argnums=(0, 1) if head_trained else (0,),
        )(hidden, head)
        return (total + value, jax.tree.map(jnp.add, head_gradient, for_head)), for_hidden

    zeros = [jax.tree.map(jnp.zeros_like, head)] if head_trained else []
    (total, head_gradient), hidden_gradient = jax.lax.scan(add, (jnp.float32(0), zeros), (hidden, targets, weights))
    return total, (head_gradient, hidden_gradient)


def _backward(loss: TokenLoss, logits: Callable, head_trained: bool, gradients: tuple, cotangent: jax.Array) -> tuple:
    for_head, for_hidden = jax.tree.map(lambda g: g * cotangent.astype(g.dtype), gradients)
    return for_head[0] if head_trained else None, for_hidden, None, None


_sum_over_chunks.defvjp(_forward, _backward)
