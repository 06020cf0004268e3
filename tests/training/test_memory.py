"""What the compiled training step never holds: the logits of all positions at once."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from jax_it import config as settings
from jax_it import pretrained, sharding
from jax_it.config import Mesh, Optimizer, Train
from jax_it.data.formats import CausalFormat, Seq2SeqFormat
from jax_it.data.packing import Shape
from jax_it.models import build
from jax_it.pretrained.storage import cast_or_quantize, storage_dtypes
from jax_it.training.optimizer import make_optimizer, make_schedule
from jax_it.training.state import start, state_shardings
from jax_it.training.step import make_train_step

ROWS, LENGTH, VOCABULARY, CHUNK = 4, 512, 128_256, 64

LLAMA = {
    "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
T5 = {
    "model_type": "t5", "vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2,
    "num_heads": 4, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.1,
}  # fmt: skip


def compile_step(architecture, chunk, rows=ROWS, length=LENGTH, **model):
    """The training step, compiled and not run."""
    model_config = settings.Model(architecture=architecture, pretrained=False, **model)
    mesh = sharding.make_mesh(Mesh(data=1), jax.devices()[:1])
    model = pretrained.add_adapter(build(architecture, "test", model_config), model_config)
    if model.kind == "causal":
        batch = CausalFormat(0).batch([[]] * rows, Shape(0, 0, length))
    else:
        batch = Seq2SeqFormat(0, 0).batch([[]] * rows, Shape(1, 64, length))
    train = Train(loss_chunk=rows * chunk, label_smoothing=0.1, z_loss=1e-4)
    schedule = make_schedule(Optimizer(), 10, 0, 0)
    optimizer = make_optimizer(train.optimizer, schedule, model.trained_logical_axes)
    frozen = {}
    if model.adapter:
        frozen = jax.eval_shape(lambda base: cast_or_quantize(base, storage_dtypes(model, model_config)), model.shapes)
    state = jax.eval_shape(lambda trained, frozen: start(trained, frozen, optimizer), model.trained_shapes, frozen)
    step = make_train_step(model, train, optimizer, schedule, mesh, state_shardings(model, state, mesh))
    with jax.set_mesh(mesh):
        shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, jnp.asarray(array).dtype), batch)
        return step.lower(state, shapes).compile()


def largest_array(architecture, chunk, **model):
    """The number of elements of the largest array in the compiled step's program."""
    program = compile_step(architecture, chunk, **model).as_text()
    found = re.findall(r"\b(?:f32|bf16|f16|s32|u32|s8|u8|pred)\[([\d,]+)\]", program)
    return max(math.prod(map(int, shape.split(","))) for shape in found)


@pytest.mark.parametrize(
    "architecture, model",
    [
        (LLAMA, {}),
        (LLAMA, {"dtype": "bfloat16", "remat": "layer"}),
        pytest.param(LLAMA, {"lora": settings.Lora(rank=4)}, marks=pytest.mark.slow),
        (LLAMA, {"lora": settings.Lora(rank=4), "quantize": "nf4"}),
        (T5, {}),
    ],
    ids=["llama", "bfloat16", "lora", "qlora", "t5"],
)
def test_no_array_of_the_step_has_the_logits_of_all_positions(architecture, model):
    assert largest_array(architecture, CHUNK, **model) <= ROWS * CHUNK * VOCABULARY


def test_logits_in_one_chunk_would_be_found():
    assert largest_array(LLAMA, LENGTH) >= ROWS * LENGTH * VOCABULARY


WIDE = {"vocab_size": 512, "hidden_size": 1024, "num_hidden_layers": 12}


@pytest.mark.parametrize("remat", ["none", "layer"])
@pytest.mark.parametrize(
    "architecture, mlp",
    [
        (LLAMA | WIDE | {"intermediate_size": 4096}, 3 * 1024 * 4096),
        (
            LLAMA | WIDE
            | {"model_type": "mixtral", "intermediate_size": 1024, "num_local_experts": 4, "sliding_window": None},
            4 * 3 * 1024 * 1024,
        ),
    ],
    ids=["llama", "mixtral"],
)  # fmt: skip
def test_no_layers_weights_are_dequantized_before_their_turn(architecture, mlp, remat):
    layer = 4 * (2 * 1024**2 + 2 * 1024 * 512 + mlp)  # bytes in float32
    adapted = {"lora": settings.Lora(rank=2), "quantize": "nf4", "dtype": "float32", "remat": remat}
    compiled = compile_step(architecture, CHUNK, rows=1, length=64, **adapted)  # few tokens: weights are what there is
    assert compiled.memory_analysis().temp_size_in_bytes < 5 * layer  # of 12, beside activations
