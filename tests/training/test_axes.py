"""Every axis of the mesh takes its share of the step's work, and what is gathered is gathered once."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_it import config as settings
from jax_it import sharding
from jax_it.config import Mesh, Optimizer, Train
from jax_it.data.formats import CausalBatch, Seq2SeqBatch
from jax_it.models import build
from jax_it.training.optimizer import make_optimizer, make_schedule
from jax_it.training.state import start, state_shardings
from jax_it.training.step import make_train_step

# Eight of everything, so that eight devices can share it.
SIZES: dict[str, dict[str, Any]] = {
    "t5": {
        "model_type": "t5", "vocab_size": 512, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 8,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.0,
    },
    "llama": {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "head_dim": 16, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8, "eos_token_id": 1,
    },
}  # fmt: skip
SIZES["mixtral"] = SIZES["llama"] | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
MESHES = {
    "data": Mesh(data=8),
    "fsdp": Mesh(data=1, fsdp=8),
    "expert": Mesh(data=1, expert=8),
    "context": Mesh(data=1, context=8),
    "tensor": Mesh(data=1, tensor=8),
    "four at once": Mesh(data=1, fsdp=2, context=2, tensor=2),
}


def batch(kind: str, rows: int = 16, source: int = 64, target: int = 128) -> Any:
    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    target_side = [array(rows, target)] * 2 + [array(rows, target, dtype=jnp.float32)] + [array(rows, target)] * 2
    if kind == "t5":
        return Seq2SeqBatch(*[array(rows, 2, source)] * 3, *target_side)
    return CausalBatch(*target_side)


def compiled(kind: str, mesh_config: Mesh) -> Any:
    # As on TPUs: a CPU alone computes activations again, and several do not.
    model = build(SIZES[kind], "the test", settings.Model(pretrained=False, attention="plain"))
    number = int(np.prod([max(getattr(mesh_config, axis), 1) for axis in sharding.AXES]))
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:number])
    with jax.set_mesh(mesh):
        schedule = make_schedule(Optimizer(), 10, 0, 0)
        optimizer = make_optimizer(Optimizer(), schedule, model.trained_logical_axes)
        shapes = jax.eval_shape(partial(start, optimizer=optimizer), model.trained_shapes, {})
        step = make_train_step(model, Train(), optimizer, schedule, mesh, state_shardings(model, shapes, mesh))
        return step.lower(shapes, batch(kind)).compile()


def cost(kind: str, mesh_config: Mesh) -> tuple[float, float]:
    """(FLOPs, bytes of what is computed on the way) of one device."""
    step = compiled(kind, mesh_config)
    return step.cost_analysis()["flops"], step.memory_analysis().temp_size_in_bytes


@pytest.fixture(scope="module")
def alone():
    found: dict[str, tuple[float, float]] = {}

    def alone(kind: str) -> tuple[float, float]:
        if kind not in found:
            found[kind] = cost(kind, Mesh(data=1))
        return found[kind]

    return alone


SHORT = {("t5", "context"), ("t5", "four at once"), ("llama", "context"), ("mixtral", "data"), ("mixtral", "expert")}
CASES = [
    pytest.param(kind, axes, marks=[] if (kind, axes) in SHORT else [pytest.mark.slow])
    for kind in SIZES
    for axes in MESHES
]


@pytest.mark.parametrize(("kind", "axes"), CASES)
def test_an_axis_divides_the_work_and_the_memory_of_a_step(alone, kind, axes):
    flops, memory = cost(kind, MESHES[axes])
    one_flops, one_memory = alone(kind)
    # A quarter more for what every device does alike, such as masks and norms of these narrow layers.
    assert flops * 8 < 1.25 * one_flops
    # Weights, their gradients and what is gathered of them are as large with data, context and tensor as on one device.
    assert memory * 8 < (3 if axes in ("expert", "tensor") else 2) * one_memory
