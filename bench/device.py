"""Training steps on the devices that are attached: examples and tokens a second, memory, share of the matmul bound.

    python bench/device.py t5-large t5-xl llama-8b-lora          # a GPU or a TPU; no network, no files
    python bench/device.py tiny --steps 2                        # a quick look on a CPU

Weights are random, and data is made up: every example of a T5 fills 512 source and 128 target positions, and four of a
causal model a row of 4,096. Each model has a process of its own, so that one that does not fit stops no other. Shares
are of a bfloat16 matmul of 8192 x 8192 (float32 and 2048 on a CPU), measured beside the steps.
"""

import argparse
import json
import random
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from measure import Remote, machine, shortest

T5_LARGE = {
    "model_type": "t5", "vocab_size": 32128, "d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_layers": 24,
    "num_heads": 16, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0,
}  # fmt: skip
LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0,
    "eos_token_id": 1,
}  # fmt: skip
# Of each model: its architecture, further settings, and how many examples a step has.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "t5-large": (T5_LARGE, {}, 64),
    "t5-xl": ({**T5_LARGE, "d_model": 2048, "d_ff": 5120, "num_heads": 32}, {"remat": "layer"}, 64),
    "llama-8b-lora": (LLAMA_8B, {"remat": "layer", "param_dtype": "bfloat16", "lora": {"rank": 16, "alpha": 32.0}}, 16),
    "tiny": ({**T5_LARGE, "vocab_size": 512, "d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 2}, {}, 2),
}
SOURCE, TARGET, ROW = 512, 128, 4096


class Training:
    """One model's step and data."""

    def __init__(self, name: str):
        from train import Ours

        from jax_it import config

        architecture, settings, size = MODELS[name]
        causal = architecture["model_type"] != "t5"
        rng = random.Random(0)

        def text(length: int) -> str:
            return "".join(rng.choices("abcdefgh ", k=length))

        prompt, completion = (
            (ROW // 8, ROW // 8) if causal else (SOURCE, TARGET)
        )  # a byte is a token; ends are tokens too
        self._folder = tempfile.TemporaryDirectory()
        file = Path(self._folder.name) / "train.jsonl"
        records = ({"prompt": text(prompt - 1), "completion": text(completion - 1)} for _ in range(64 * size))
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        lengths = {"max_seq_length": ROW} if causal else {"max_source_length": SOURCE, "max_target_length": TARGET}
        mine = {
            "model": {"architecture": architecture, "pretrained": False, "tokenizer": "bytes", **settings},
            "data": {"train": [{"path": str(file)}], "cache_dir": self._folder.name, "max_truncated": 1.0, **lengths},
            "train": {"batch_size": size, "optimizer": {"name": "adamw", "learning_rate": 1e-4}},
        }
        self._ours, self._size = Ours(config.resolve(mine)), size

    def layout(self) -> str:
        return self._ours.layout()

    def steps(self, number: int) -> dict[str, float]:
        """Take steps, after one that compiles; return what they took, and what a second of them did."""
        import jax
        import jax.numpy as jnp

        began = time.perf_counter()
        self._ours.take(1)
        compiling = time.perf_counter() - began
        taken = self._ours.take(number * self._size)
        accelerator = jax.default_backend() != "cpu"
        size, dtype = (8192, jnp.bfloat16) if accelerator else (2048, jnp.float32)
        matrix, product = jnp.ones((size, size), dtype), jax.jit(lambda a: a @ a)
        rate = jax.device_count() * 2 * size**3 / shortest(lambda: product(matrix).block_until_ready())
        memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", self._ours.memory())
        return {
            "examples/s": taken.examples / taken.seconds,
            "seconds a step": taken.seconds * self._size / taken.examples,
            "matmul TFLOP/s": rate / 1e12,
            "share of it": taken.flops / taken.seconds / rate,
            "peak GB": memory / 1e9,
            "seconds to compile": compiling,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=list(MODELS))
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    print(machine(), flush=True)
    for name in options.models:
        try:
            remote = Remote(partial(Training, name))
            print(f"{name}: {remote.call('layout')}", flush=True)
            found = remote.call("steps", options.steps)
            remote.close()
        except EOFError:  # its process has said why
            print(f"{name}: failed", flush=True)
            continue
        print(f"{name}: " + ", ".join(f"{value:.3g} {what}" for what, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
