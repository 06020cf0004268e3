"""What a host holds while it loads a model: its own shards, and a little."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.multihost import loading, processes

ARCHITECTURE: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 8192, "hidden_size": 640, "head_dim": 64, "intermediate_size": 2560,
    "num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 64,
    "eos_token_id": 1,
}  # fmt: skip
TENSOR = 8192 * 640 * 4  # bytes of the largest
# What the interpreter and XLA take for themselves between the two measurements, whatever the model's size: compiled
# programs, threads' stacks, the allocator's slack. A model of four layers of width 64, whose shards are 0.5 to 3.4 MB,
# takes 12.7 to 14.7 MB.
FIXED = 16e6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 372 MB."""
    random, place = np.random.default_rng(0), tmp_path_factory.mktemp("model")
    width, inner, vocabulary = (ARCHITECTURE[f"{name}_size"] for name in ("hidden", "intermediate", "vocab"))
    shapes = {"model.embed_tokens": (vocabulary, width), "lm_head": (vocabulary, width), "model.norm": (width,)}
    for layer in range(ARCHITECTURE["num_hidden_layers"]):
        parts = {
            "self_attn.q_proj": (1024, width), "self_attn.k_proj": (512, width), "self_attn.v_proj": (512, width),
            "self_attn.o_proj": (width, 1024), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner), "input_layernorm": (width,), "post_attention_layernorm": (width,),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    tensors = {f"{name}.weight": random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    (place / "config.json").write_text(json.dumps(ARCHITECTURE))
    return place


def measure(count: int, folder: Path | str, kept: str) -> list[dict[str, int]]:
    """Bytes of each process: its shards, and the most that it held in memory, mapped files too."""
    code = f"import runpy, sys; sys.argv[0] = {loading.__file__!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    started = processes.start(count, code, folder, kept, json.dumps(ARCHITECTURE))
    done = processes.ends(started)
    assert [end.code for end in done] == [0] * count, done
    return [json.loads(next(line for line in end.text.splitlines() if line.startswith("{"))) for end in done]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
@pytest.mark.parametrize(("count", "kept"), [(1, "float32"), (1, "bfloat16"), (1, "nf4"), (1, "int8"), (2, "float32")])
def test_loading_holds_the_hosts_shards_and_a_tensor(folder: Path, count: int, kept: str) -> None:
    values = (folder / "model.safetensors").stat().st_size // 4
    bytes_of = {"float32": 4, "bfloat16": 2, "nf4": 0.54, "int8": 1.04}[kept]
    expected = values * bytes_of
    if kept in ("nf4", "int8"):  # the embedding and the head keep the dtype of the computation
        expected += 2 * TENSOR / 4 * (4 - bytes_of)
    for found in measure(count, folder, kept):
        assert found["shards"] == pytest.approx(expected / count, rel=0.1)  # replicated norms, small blocks
        assert found["peak"] <= 1.2 * found["shards"] + TENSOR + FIXED
