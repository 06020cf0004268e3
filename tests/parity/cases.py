"""All cases, of encoder-decoders and of causal models, and what jax_it makes of them."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jax_it import losses
from jax_it.data.formats import CausalBatch, Seq2SeqBatch
from jax_it.models import Model, Params
from jax_it.pretrained import hf
from tests.parity import case as _case
from tests.parity import causal_cases, seq2seq_cases
from tests.parity.case import DTYPES, Case, load, tensor_shapes, tensors, write
from tests.parity.causal_cases import CausalInputs
from tests.parity.seq2seq_cases import NEWER, SOURCE_LENGTHS, TARGET_LENGTHS, Seq2SeqInputs

__all__ = [
    "ALL", "BY_NAME", "CASES", "DTYPES", "NEWER", "SOURCE_LENGTHS", "TARGET_LENGTHS",
    "Case", "Inputs", "Results",
    "batch", "by_name", "digest", "inputs", "is_causal", "load", "packed", "params", "plain", "relative_error",
    "results", "tensor_shapes", "tensors", "write",
]  # fmt: skip

Inputs = Seq2SeqInputs | CausalInputs
CASES = seq2seq_cases.T5_CASES  # what tests of T5 in tests/models take
ALL = [*seq2seq_cases.CASES, *causal_cases.CASES]
BY_NAME = {case.name: case for case in ALL}

# Of the same computation as another case, but for a line or two: compiled by make parity and make test-slow alone.
VARIANTS = {
    "t5_1_1_tied", "byt5", "deep_decoder", "mt5_tied", "umt5_tied", "t5gemma_untied", "t5gemma_wide",
    "llama2", "llama3_tied", "llama_linear", "llama_biased", "smollm2", "mistral_nemo", "qwen2_untied", "qwen2_window",
    "qwen3_yarn", "gemma", "gemma3_linear", "phi3", "phi4", "phi4_mini_long", "gpt2_saved", "gpt_neox_serial",
    "qwen3_moe_unnormed", "llama3_saved", "qwen3_saved", "gemma3_saved", "qwen3_moe_saved",
}  # fmt: skip


def params(cases: Iterable[Case]) -> list[Any]:
    """The cases for pytest's `parametrize`; variants are marked slow."""
    return [pytest.param(c, id=c.name, marks=pytest.mark.slow if c.name in VARIANTS else ()) for c in cases]


def is_causal(case: Case) -> bool:
    return case.name in {other.name for other in causal_cases.CASES}


def inputs(case: Case) -> Inputs:
    return causal_cases.inputs(case) if is_causal(case) else seq2seq_cases.inputs(case)


def batch(case: Case, given: Inputs) -> CausalBatch | Seq2SeqBatch:
    """A row for each example."""
    if isinstance(given, CausalInputs):
        return causal_cases.batch(given)
    return seq2seq_cases.batch(given, seq2seq_cases.start(case))


def packed(case: Case, given: Inputs) -> CausalBatch | Seq2SeqBatch:
    """All examples in one row."""
    if isinstance(given, CausalInputs):
        return causal_cases.packed(given)
    return seq2seq_cases.packed(given, seq2seq_cases.start(case))


def digest(case: Case) -> str:
    """Changes with anything that PyTorch's results for the case depend on."""
    return _case.digest(case, inputs(case))


class Results(NamedTuple):
    """What a model makes of a case's inputs."""

    logits_BTV: np.ndarray  # padded positions included: what stands there means nothing
    loss: float  # the mean over target tokens
    gradients: dict[str, np.ndarray]  # of the loss, by Transformers' names


def results(model: Model, params: Params, arrays: CausalBatch | Seq2SeqBatch) -> Results:
    """jax_it's results for a batch, computed as in training: the loss in chunks, gradients by `jax.grad`."""

    @jax.jit
    def compute(params: Params) -> Any:
        def loss_of(params: Params) -> Any:
            hidden_BTD = model.hidden_states(params, arrays)[0]
            head = model.head(params)
            loss, weight = losses.chunked_sum(
                losses.cross_entropy, model.logits, 16, head, hidden_BTD, arrays.targets_BT, arrays.weights_BT
            )
            return loss / weight, model.logits(head, hidden_BTD)

        return jax.value_and_grad(loss_of, has_aux=True)(params)

    (loss, logits_BTV), gradients = compute(params)
    return Results(np.asarray(logits_BTV), float(loss), by_name(model, gradients))


def by_name(model: Model, params: Params) -> dict[str, np.ndarray]:
    """A tree like the params as tensors with Transformers' names and layouts, by the way that `hf.save` takes."""
    return {plain(name): tensor for name, tensor in hf.tensors_of(model, params, np.dtype(np.float32))}


def plain(name: str) -> str:
    """The name without the prefix that some of GPT-2's checkpoints have and others not."""
    return name.removeprefix("transformer.")


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, as a share of the largest value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
