"""Peak memory of one training step: jax_it against Seq2SeqTrainer, or SFTTrainer, at the same useful tokens.

    python bench/memory.py --config t0_t5_small:random --config.data.train='[{"path": "data/t0/train.jsonl.gz"}]'
    python bench/memory.py … --config.train.batch_size=4                                             # a quick look

Sides are those of `bench/train.py`, one after the other in a process each: weights, optimizer, two steps of as many
examples. What a process holds before it has a model (interpreter and libraries) is printed too. The limit is float32
weights, gradients and both moments of AdamW: what no step can do without.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from measure import Remote, machine
from train import Ours, Theirs, opened, peak_memory, tokenized


class Imports:
    """A side that imports its libraries, and nothing else."""

    def __init__(self, *modules: str):
        for module in modules:
            __import__(module)

    def memory(self) -> int:
        return peak_memory()


def peak(make: Any, *takes: tuple[Any, ...]) -> float:
    """Return the peak memory, in GB, of a side in a process of its own that has taken steps."""
    remote = Remote(make)
    for arguments in takes:
        remote.call("take", *arguments)
    found: int = remote.call("memory")
    remote.close()
    return found / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    options, rest = parser.parse_known_args()
    print(machine(), flush=True)
    config, padded, values = opened(options.config, rest)
    size = config.train.batch_size
    examples = tokenized(padded, 2 * size)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values))
        peer = config.model.path if config.model.pretrained else folder
        theirs = partial(Theirs, peer, config.model.path, examples, size, config.data.max_seq_length, config.train.seed)
        found = {
            "jax_it": peak(partial(Ours, config), (2 * size,)),
            "peer": peak(theirs, ("random", 2 * size)),
            "jax_it's libraries": peak(partial(Imports, "jax_it.training.loop")),
            "the peer's libraries": peak(partial(Imports, "torch", "transformers.trainer")),
        }
    print("; ".join(f"{name} {gigabytes:.2f} GB" for name, gigabytes in found.items()))
    print(f"jax_it over the peer {found['jax_it'] / found['peer']:.2f}")


if __name__ == "__main__":
    main()
