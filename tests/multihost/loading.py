"""Loads a model in this process and prints what memory that took; run by test_host_memory in processes of its own.

Arguments: a model's folder, or "" for random weights; how the weights are kept (float32, bfloat16, nf4, int8).
"""

import ctypes
import json
import re
import sys
from pathlib import Path

import jax

from jax_it import config as settings
from jax_it import hosts, pretrained, sharding


def resident(what: str) -> int:
    """Bytes of this process in memory now (VmRSS), or at most so far (VmHWM): mapped files count."""
    return int(re.findall(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024


def main(folder: str, kept: str, architecture: str) -> None:
    hosts.start()
    mesh = sharding.make_mesh(settings.Mesh(data=1, fsdp=jax.device_count() // 2, tensor=2))
    quantize = kept if kept in ("nf4", "int8") else "none"
    # Frozen weights are kept in the computation's dtype, or quantized; trained ones in `param_dtype`.
    lora = settings.Lora(rank=1 if quantize != "none" else 0)
    config = settings.Model(
        path=folder, pretrained=bool(folder), architecture=json.loads(architecture), quantize=quantize, lora=lora,
        param_dtype="float32" if quantize != "none" else kept,
    )  # fmt: skip
    jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros(8))())  # the backend is there
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    before = resident("VmRSS")
    _, params = pretrained.load_base(config, mesh)
    jax.block_until_ready(params)
    peak = resident("VmHWM") - before
    shards = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    print(json.dumps({"peak": peak, "shards": shards, "left": resident("VmRSS") - before}))
    hosts.leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
