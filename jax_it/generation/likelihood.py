"""Log-likelihoods of given continuations of prompts; each prompt is computed once for all of its continuations.

All tokens of a continuation count: an encoder-decoder's has its end token, as T0 and FLAN rank options, and a causal
model's has none, as in the Language Model Evaluation Harness.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_it import sharding
from jax_it.data.formats import CausalBatch, Seq2SeqBatch
from jax_it.errors import UserError
from jax_it.generation import length_buckets
from jax_it.generation.sampling import likeliest
from jax_it.models import Model, Params
from jax_it.models.kv_cache import take_rows

# The cost of a token in a decoding step, in tokens of a full forward pass: about 4 on two CPU cores with a model of
# 135M parameters and 32 rows. Where steps cost more, some long continuations are decoded that had better not be.
STEP_COST = 4
LOGIT_ROWS = 64  # positions of which logits are in memory together, where each token's log-probability is asked for


class LikelihoodRequest(NamedTuple):
    """Token ids. The prompt is an encoder-decoder's source with its end token, or a causal model's tokens so far."""

    prompt: Sequence[int]
    continuations: Sequence[Sequence[int]]  # of one token or more each


class Likelihood(NamedTuple):
    log_prob: float  # nats: the sum over all tokens of the continuation
    greedy: bool  # whether each of its tokens is the likeliest


class Likelihoods:
    """Compute log-likelihoods for one model, and keep the compiled programs; `shapes` are theirs.

    A prompt is prefilled once, and its continuations are then decoded side by side, the first step serving all of
    them. Where they are so long that computing the prompt again costs less (such as whole texts after a beginning
    token), each is a row of its own behind the prompt, in a full forward pass. Both give the same, but for rounding.
    """

    def __init__(self, model: Model, mesh: jax.sharding.Mesh, batch_size: int):
        self._model, self._mesh, self._size = model, mesh, batch_size
        everywhere = sharding.replicated(mesh)
        self._decode = jax.jit(partial(_decode, model), out_shardings=everywhere)
        self._forward = jax.jit(partial(_forward, model), out_shardings=everywhere)
        self.shapes: set[tuple[str, int, int, int, int]] = set()  # program, rows, prompt, continuations, their tokens

    def __call__(self, params: Params, requests: Sequence[LikelihoodRequest]) -> Iterator[tuple[int, list[Likelihood]]]:
        """Yield (index, the likelihood of each continuation) of every request, in any order, the same on all hosts.

        Raises ValueError for a prompt or a continuation without a token, and UserError for logits that are not finite.
        """
        groups: dict[tuple[bool, int, int], list[int]] = {}
        for i, request in enumerate(requests):
            lengths = [len(tokens) for tokens in request.continuations]
            if not request.prompt or not lengths or not min(lengths):
                raise ValueError(f"request {i}: a prompt and its continuations need one token or more each")
            decoded = len(request.prompt) + STEP_COST * sum(lengths) < len(request.prompt) * len(lengths) + sum(lengths)
            decoded = decoded or max(lengths) == 1
            groups.setdefault((decoded, _few(len(lengths)), _few(max(lengths))), []).append(i)
        waiting: list[tuple[list[int], tuple[jax.Array, jax.Array]]] = []
        for (decoded, number, length), members in sorted(groups.items()):
            members.sort(key=lambda i: len(requests[i].prompt))
            # Where all continuations are one token, each prompt has only its own row.
            size = self._size if decoded and length == 1 else max(1, self._size // number)
            rows = sharding.round_up_to_shards(min(size, len(members)), self._mesh)
            batches = [members[start : start + rows] for start in range(0, len(members), rows)]
            shape = "decode" if decoded else "forward", rows, number, length
            compiled = {width for program, many, width, *rest in self.shapes if (program, many, *rest) == shape}
            longest = [len(requests[batch[-1]].prompt) for batch in batches]
            computed = rows if decoded else rows * number
            for batch, width in zip(batches, length_buckets.choose(longest, computed, compiled), strict=True):
                chosen = [requests[i] for i in batch] + [requests[batch[0]]] * (rows - len(batch))
                run = self._run_decode if decoded else self._run_forward
                self.shapes.add((shape[0], rows, width, number, length))
                waiting.append((batch, run(params, chosen, width, number, length)))
                if len(waiting) == 2:  # one batch ahead of what is read
                    yield from _read(requests, *waiting.pop(0))
        for item in waiting:
            yield from _read(requests, *item)

    def _run_decode(
        self, params: Params, requests: Sequence[LikelihoodRequest], width: int, number: int, length: int
    ) -> tuple[jax.Array, jax.Array]:
        prompts = length_buckets.pad([request.prompt for request in requests], len(requests), width)
        arrays = sharding.place((*prompts, *_continuations(requests, number, length)), self._mesh)
        with jax.set_mesh(self._mesh):
            return self._decode(params, *arrays)

    def _run_forward(
        self, params: Params, requests: Sequence[LikelihoodRequest], width: int, number: int, length: int
    ) -> tuple[jax.Array, jax.Array]:
        tokens_BCT, lengths_BC = _continuations(requests, number, length)
        # One row for each continuation: the prompt and the continuation behind it, or a source and a target.
        batch: CausalBatch | Seq2SeqBatch
        if self._model.kind == "causal":
            batch, first_B = _causal_rows(requests, width, tokens_BCT, lengths_BC, self._model.options.prefix_lm)
        else:
            batch, first_B = _seq2seq_rows(requests, width, tokens_BCT, lengths_BC, self._model.start_and_pad[0])
        arrays = sharding.place((batch, first_B, tokens_BCT, lengths_BC), self._mesh)
        with jax.set_mesh(self._mesh):
            return self._forward(params, *arrays)


def token_log_probs(
    model: Model, params: Params, tokens_BT: jax.Array, segments_BT: jax.Array, *, alternatives: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Return the log-probability [B, T - 1] of each token of a causal model's texts but the first, and the likeliest.

    Those are (log-probabilities, tokens), both [B, T - 1, `alternatives`]. Logits exist for `LOGIT_ROWS` positions at
    a time; segment 0 is padding.
    """
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    prefix_BT = segments_BT if model.options.prefix_lm else None
    arrays: Any = tokens_BT, tokens_BT, segments_BT, segments_BT, positions_BT * segments_BT, prefix_BT
    batch = CausalBatch(*arrays)
    states_BTD, head_VD = model.hidden_states(params, batch)[0][:, :-1], model.head(params)

    def at(item: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Any]:
        state_D, token = item
        log_probs_V = jax.nn.log_softmax(model.logits(head_VD, state_D))
        return log_probs_V[token], jax.lax.top_k(log_probs_V, alternatives)

    pairs = states_BTD.reshape(-1, states_BTD.shape[-1]), tokens_BT[:, 1:].reshape(-1)
    found = jax.lax.map(at, pairs, batch_size=LOGIT_ROWS)
    return jax.tree.map(lambda x: x.reshape(len(tokens_BT), -1, *x.shape[1:]), found)


def _few(number: int) -> int:
    """Return the smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, … that is at least `number`: few compiled shapes."""
    size = 1
    while size < number:
        size = size + 1 if size < 4 else size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _continuations(requests: Sequence[LikelihoodRequest], number: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens [B, C, T] and how many of them count [B, C], 0 where there is no continuation."""
    tokens = np.zeros((len(requests), number, length), np.int32)
    lengths = np.zeros((len(requests), number), np.int32)
    for row, request in enumerate(requests):
        for column, continuation in enumerate(request.continuations):
            tokens[row, column, : len(continuation)] = continuation
            lengths[row, column] = len(continuation)
    return tokens, lengths


def _read(
    requests: Sequence[LikelihoodRequest], batch: list[int], found: tuple[jax.Array, jax.Array]
) -> Iterator[tuple[int, list[Likelihood]]]:
    sums, greedy = (np.asarray(array) for array in found)
    for row, i in enumerate(batch):
        number = len(requests[i].continuations)
        if not np.isfinite(sums[row, :number]).all():
            raise UserError(
                f"the model's logits for prompt {i + 1} are not finite, so there are no log-likelihoods: its weights "
                "are broken, or too large for the dtype that it is computed in"
            )
        yield i, [Likelihood(float(sums[row, c]), bool(greedy[row, c])) for c in range(number)]


def _decode(
    model: Model,
    params: Params,
    prompts_BS: jax.Array,
    segments_BS: jax.Array,
    tokens_BCT: jax.Array,
    lengths_BC: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return the sums of log-probabilities [B, C], and whether every token is the likeliest [B, C]."""
    rows, number, length = tokens_BCT.shape
    token_B, position_B, cache = model.prefill(params, prompts_BS, segments_BS, length)
    step = partial(model.decode_step, model.prepare_for_decoding(params))
    logits_BV, cache = step(token_B, position_B, cache)
    found = _of_tokens(logits_BV, tokens_BCT[:, :, 0])
    if length == 1:
        return _counted((found[0][..., None], found[1][..., None]), lengths_BC)
    cache = take_rows(cache, jnp.repeat(jnp.arange(rows), number))
    positions_B = jnp.repeat(position_B, number) + 1

    def advance(carry: tuple, pair_2BC: jax.Array) -> tuple:
        done, cache = carry
        token_B, next_BC = pair_2BC[0].reshape(-1), pair_2BC[1]
        logits_BV, cache = step(token_B, positions_B + done, cache)
        found = _of_tokens(logits_BV, next_BC.reshape(-1, 1))
        return (done + 1, cache), (found[0].reshape(rows, number), found[1].reshape(rows, number))

    tokens_TBC = jnp.moveaxis(tokens_BCT, 2, 0)
    pairs = jnp.stack([tokens_TBC[:-1], tokens_TBC[1:]], axis=1)
    later: Any
    _, later = jax.lax.scan(advance, (jnp.int32(0), cache), pairs)
    together = jax.tree.map(lambda one, rest: jnp.moveaxis(jnp.concatenate([one[None], rest]), 0, 2), found, later)
    return _counted(together, lengths_BC)


def _of_tokens(logits_BV: jax.Array, tokens_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the log-probability of each of the tokens that may come next, and whether it is the likeliest, [B, C]."""
    log_probs_BC = jnp.take_along_axis(jax.nn.log_softmax(logits_BV), tokens_BC, axis=-1)
    return log_probs_BC, likeliest(logits_BV)[:, None] == tokens_BC


def _counted(found_BCT: tuple[jax.Array, jax.Array], lengths_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
    log_probs_BCT, likeliest_BCT = found_BCT
    counts_BCT = jnp.arange(log_probs_BCT.shape[-1]) < lengths_BC[..., None]
    return jnp.where(counts_BCT, log_probs_BCT, 0).sum(-1), (likeliest_BCT | ~counts_BCT).all(-1)


def _causal_rows(
    requests: Sequence[LikelihoodRequest], width: int, tokens_BCT: np.ndarray, lengths_BC: np.ndarray, prefix_lm: bool
) -> tuple[CausalBatch, np.ndarray]:
    """Return a row of prompt and continuation for each, and the position [B C] that predicts its first token."""
    rows, number, length = tokens_BCT.shape
    tokens, segments, prefix = np.zeros((3, rows * number, width + length), np.int32)
    targets, weights = np.zeros_like(tokens), np.zeros(tokens.shape, np.float32)
    first = np.zeros(rows * number, np.int32)
    for row, request in enumerate(requests):
        at = len(request.prompt)
        for column in range(number):
            here, stop = row * number + column, at + lengths_BC[row, column]
            tokens[here, :at] = request.prompt
            tokens[here, at:stop] = tokens_BCT[row, column, : lengths_BC[row, column]]
            segments[here, :stop] = 1
            targets[here, at - 1 : stop - 1] = tokens[here, at:stop]
            weights[here, at - 1 : stop - 1] = 1
            prefix[here, :at] = 1
            first[here] = at - 1
    positions = np.arange(width + length, dtype=np.int32) * segments  # of padding none is beyond a model's last
    return CausalBatch(tokens, targets, weights, segments, positions, prefix if prefix_lm else None), first


def _seq2seq_rows(
    requests: Sequence[LikelihoodRequest], width: int, tokens_BCT: np.ndarray, lengths_BC: np.ndarray, start: int
) -> tuple[Seq2SeqBatch, np.ndarray]:
    """Return a row of source and target for each, and 0 [B C], the position that predicts its first token."""
    rows, number, length = tokens_BCT.shape
    source, source_segments = np.zeros((2, rows * number, 1, width), np.int32)
    for row, request in enumerate(requests):
        here = slice(row * number, (row + 1) * number)
        source[here, 0, : len(request.prompt)] = request.prompt
        source_segments[here, 0, : len(request.prompt)] = 1
    targets = tokens_BCT.reshape(-1, length)
    counts = np.arange(length) < lengths_BC.reshape(-1, 1)
    tokens = np.concatenate([np.full((len(targets), 1), start, np.int32), targets[:, :-1]], axis=1)
    segments = np.ones_like(targets)  # a padding row still needs a position to attend to
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), targets.shape).copy()
    source_positions = np.broadcast_to(np.arange(width, dtype=np.int32), source.shape).copy()
    batch = Seq2SeqBatch(
        source, source_segments, source_positions, tokens, targets, counts.astype(np.float32), segments, positions
    )
    return batch, np.zeros(rows * number, np.int32)


def _forward(
    model: Model,
    params: Params,
    batch: CausalBatch | Seq2SeqBatch,
    first_B: jax.Array,
    tokens_BCT: jax.Array,
    lengths_BC: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Do what `_decode` does in one forward pass. Logits exist for one position of all rows at a time."""
    states_BTD, head_VD = model.hidden_states(params, batch)[0], model.head(params)
    rows, last = jnp.arange(first_B.shape[0]), states_BTD.shape[1] - 1

    def at(item: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        number, tokens_BC = item
        states_BD = states_BTD[rows, jnp.minimum(first_B + number, last)]
        found = _of_tokens(model.logits(head_VD, states_BD), tokens_BC.reshape(-1, 1))
        return found[0].reshape(tokens_BC.shape), found[1].reshape(tokens_BC.shape)

    tokens_TBC = jnp.moveaxis(tokens_BCT, 2, 0)
    found = jax.lax.map(at, (jnp.arange(len(tokens_TBC)), tokens_TBC))
    return _counted(jax.tree.map(lambda array: jnp.moveaxis(array, 0, 2), found), lengths_BC)
