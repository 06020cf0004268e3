"""Examples per second of training: jax_it against Transformers' Seq2SeqTrainer, or TRL's SFTTrainer.

    python bench/train.py --config t0_t5_small:random --config.data.train='[{"path": "data/t0/train.jsonl.gz"}]'
    python bench/train.py --config causal_lm --config.model.path=FOLDER --config.data.train=…     # with TRL installed
    python bench/train.py … --examples 48 --rounds 3 --config.train.batch_size=16                    # a quick look

The config is jax_it's; the peer trains the same tokens with the same number of examples a step, the same model,
AdamW and dropout, in float32 on all cores of the CPU. Its batches are padded to their longest: drawn at random, as is
its default, or grouped by length, which is its best setting for padded batches. SFTTrainer can pack too: rows of
data.max_seq_length tokens, about as many tokens a step; without a FlashAttention for CPUs its examples see each other
there, so it is a faster and a different computation.

The peer held 4.8 GB for 16 examples of 512/128 of T5 1.1 small; --config.train.batch_size=4 needs less.

Each side has its own process, and only one works at a time. Sides are warmed up by a step of every shape; then rounds
alternate, and a ratio is of one round. Seconds are those of steps, without loading and logging. The bound is the
matmul FLOPs of the rows as they are packed over the rate of float32 matmuls of 2048 x 2048, measured in every round;
`full` counts the positions of the rows that hold tokens.
"""

import argparse
import itertools
import json
import os
import random
import resource
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from measure import SIZE, Remote, flops_per_second, machine

Example = tuple[list[int], list[int]]  # an encoder-decoder's source and target; a causal model's tokens and loss mask
POOL = 50  # batches of examples that the peer groups: as many as its sampler sorts at a time


class Round(NamedTuple):
    """What a side has trained in a round."""

    examples: int
    seconds: float
    processor_seconds: float  # of all cores
    flops: float = 0.0


# jax_it. The functions of a side run in its own process.


class Ours:
    """jax_it's own step and data, and its rate of matmuls."""

    def __init__(self, config: Any):
        import jax
        import jax.numpy as jnp

        from jax_it import pretrained, sharding
        from jax_it.allocator import keep_memory
        from jax_it.run import start_run
        from jax_it.training.state import start
        from jax_it.training.step import prepare
        from jax_it.training.throughput import step_flops

        keep_memory()
        self._mesh = sharding.make_mesh(config.mesh)
        with jax.set_mesh(self._mesh):
            run = start_run(config, self._mesh)
            assert run.data
            self._data = run.data.train
            self._model, params = pretrained.load(config.model, self._mesh, config.train.seed)
            prepared = prepare(self._model, config, self._mesh, {}, 1000, 10, 10)
            begin = jax.jit(partial(start, optimizer=prepared.optimizer), out_shardings=prepared.shardings)
            self._state = begin(params, {})  # as training does: the first step compiles for all
        self._prepared, self._flops = prepared, partial(step_flops, self._model)
        self._number, self._shapes = 0, set[Any]()
        matrix = jnp.ones((SIZE, SIZE))
        self._product = jax.jit(lambda a: a @ a).lower(matrix).compile(), matrix

    def layout(self) -> str:
        return str(self._data.layout)

    def take(self, examples: int) -> Round:
        """Take steps until there were so many examples; a step of a new shape runs once before it is timed."""
        done = Round(0, 0.0, 0.0)
        while done.examples < examples:
            drawn = self._data.batch(self._number)
            self._number += 1
            if drawn.shape not in self._shapes:
                self._shapes.add(drawn.shape)
                self._step(drawn.batch)
            seconds, processor_seconds = self._step(drawn.batch)
            rows = drawn.sizes.target_positions / drawn.shape.target
            new = drawn.sizes.examples, seconds, processor_seconds, self._flops(rows, drawn.shape)
            done = Round(*(a + b for a, b in zip(done, new, strict=True)))
        return done

    def _step(self, batch: Any) -> tuple[float, float]:
        import jax

        began, worked = time.perf_counter(), time.process_time()
        with jax.set_mesh(self._mesh):
            self._state, metrics = self._prepared.step(self._state, batch)
        metrics["loss"].block_until_ready()
        return time.perf_counter() - began, time.process_time() - worked

    def memory(self) -> int:
        return peak_memory()

    def rate(self) -> float:
        """FLOPs per second of a large matmul."""
        multiply, matrix = self._product
        return flops_per_second(lambda: multiply(matrix).block_until_ready())


# Transformers and TRL.


class Theirs:
    """The peer's Trainer, on batches in an order that is fixed before it starts."""

    def __init__(self, folder: str, tokenizer: str, examples: list[Example], size: int, length: int, seed: int):
        import torch
        import transformers

        torch.set_num_threads(os.cpu_count() or 1)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        values = transformers.AutoConfig.from_pretrained(folder)
        self._causal = not values.is_encoder_decoder
        auto = transformers.AutoModelForCausalLM if self._causal else transformers.AutoModelForSeq2SeqLM
        weights = (Path(folder) / "model.safetensors").exists()
        self._model = auto.from_pretrained(folder, dtype=torch.float32) if weights else auto.from_config(values)
        self._tokenizer, self._examples, self._batch_size = tokenizer, examples, size
        lengths = [len(example[0]) for example in examples]
        self._length, self._packed_size = length, max(1, round(size * sum(lengths) / len(lengths) / length))
        order = torch.Generator().manual_seed(seed)
        grouped = transformers.trainer_pt_utils.get_length_grouped_indices(lengths, size, generator=order)
        at_random = torch.randperm(len(examples), generator=order).tolist()
        self._batches = {}
        for mode, indices in (("random", at_random), ("grouped", grouped), ("packed", at_random)):
            batches = [indices[i : i + size] for i in range(0, len(indices), size)]
            random.Random(seed).shuffle(batches)  # the sampler puts the longest first
            self._batches[mode] = itertools.cycle(batches)

    def take(self, mode: str, examples: int) -> Round:
        """Train on batches of that mode, and time from the first step's start to the last one's end."""
        import transformers

        batches = list(itertools.islice(self._batches[mode], -(-examples // self._batch_size)))
        times: list[tuple[float, float]] = []

        class Clock(transformers.TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                times.append((time.perf_counter(), time.process_time()))

            on_step_end = on_step_begin

        with tempfile.TemporaryDirectory() as output:
            common = {
                "output_dir": output, "num_train_epochs": 1,
                "per_device_train_batch_size": self._packed_size if mode == "packed" else self._batch_size,
                "logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
                "use_cpu": True, "bf16": False, "train_sampling_strategy": "sequential",
            }  # fmt: skip
            chosen = [self._examples[i] for batch in batches for i in batch]
            if self._causal:
                trainer = self._sft(chosen, {**common, "packing": mode == "packed"})
            else:
                trainer = self._seq2seq(chosen, common)
            trainer.add_callback(Clock())
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
        seconds, processor_seconds = (end - begin for begin, end in zip(times[0], times[-1], strict=True))
        return Round(len(chosen), seconds, processor_seconds)

    def _seq2seq(self, examples: list[Example], common: dict[str, Any]) -> Any:
        import torch
        import transformers

        def collate(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
            """Pad to the longest, as DataCollatorForSeq2Seq does with a tokenizer."""
            pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
            ids, labels = ([torch.tensor(row[name]) for row in rows] for name in ("input_ids", "labels"))
            return {
                "input_ids": pad(ids, padding_value=self._model.config.pad_token_id),
                "attention_mask": pad([torch.ones_like(x) for x in ids]),
                "labels": pad(labels, padding_value=-100),
            }

        return transformers.Seq2SeqTrainer(
            self._model,
            transformers.Seq2SeqTrainingArguments(**common),
            train_dataset=[{"input_ids": source, "labels": target} for source, target in examples],
            data_collator=collate,
        )

    def _sft(self, examples: list[Example], common: dict[str, Any]) -> Any:
        import datasets
        import transformers
        import trl

        rows = [{"input_ids": tokens, "completion_mask": mask} for tokens, mask in examples]
        return trl.SFTTrainer(
            self._model,
            trl.SFTConfig(**common, completion_only_loss=True, gradient_checkpointing=False, max_length=self._length),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=transformers.AutoTokenizer.from_pretrained(self._tokenizer),
        )

    def memory(self) -> int:
        return peak_memory()


def peak_memory() -> int:
    """Return the most bytes that this process had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def opened(path: str, rest: list[str]) -> tuple[Any, Any, dict[str, Any]]:
    """Return a config with what both sides share, the same without packing, and the model's config.json."""
    from jax_it.cli import overrides
    from jax_it.config import load, resolve, to_dict
    from jax_it.pretrained.hf import read_config_json

    changes = {"train.batch_size": "16", "train.optimizer.name": "adamw", "model.attention": "auto"}
    config = load(path, {**changes, **overrides(rest, takes_config=True)})
    tree = to_dict(config)
    padded = resolve({**tree, "data": {**tree["data"], "packing": False}})
    return config, padded, read_config_json(config.model)[0]


def tokenized(config: Any, number: int) -> list[Example]:
    """Return jax_it's own tokens of the first examples of its order, without padding."""
    import jax

    from jax_it import sharding
    from jax_it.run import start_run

    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        run = start_run(config, mesh)
    assert run.data
    found: list[Example] = []
    for step in itertools.count():
        batch: Any = run.data.train.batch(step).batch
        for row in range(len(batch.tokens_BT)):
            there = batch.segments_BT[row] > 0
            if run.model.kind == "seq2seq":
                source = batch.source_BGS[row][batch.source_segments_BGS[row] > 0].tolist()
                found.append((source, batch.targets_BT[row][there].tolist()))
            else:
                loss_mask = [0, *batch.weights_BT[row][there][:-1].astype(int).tolist()]
                found.append((batch.tokens_BT[row][there].tolist(), loss_mask))
            if len(found) == number:
                return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--examples", type=int, default=400, help="of each side, at least")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--modes", default="random,grouped", help="of the peer: random, grouped, packed (SFTTrainer)")
    options, rest = parser.parse_known_args()
    print(machine(), flush=True)
    config, padded, values = opened(options.config, rest)
    size = config.train.batch_size
    examples = tokenized(padded, POOL * size)
    each, modes = -(-options.examples // options.rounds), options.modes.split(",")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values))  # of a model with random weights
        peer = folder if not config.model.pretrained else config.model.path
        ours = Remote(partial(Ours, config))
        theirs = Remote(
            partial(Theirs, peer, config.model.path, examples, size, config.data.max_seq_length, config.train.seed)
        )
        print(ours.call("layout"), flush=True)
        ours.call("take", 1)
        theirs.call("take", modes[0], 1)
        found: dict[str, list[Round]] = {name: [] for name in ("jax_it", *modes)}
        bounds = []
        for _ in range(options.rounds):
            found["jax_it"].append(ours.call("take", each))
            for mode in modes:
                found[mode].append(theirs.call("take", mode, each))
            bounds.append(found["jax_it"][-1].flops / ours.call("rate") / found["jax_it"][-1].seconds)
            print({name: f"{done[-1].examples / done[-1].seconds:.2f}" for name, done in found.items()}, flush=True)
        memory = {"jax_it": ours.call("memory"), "peer": theirs.call("memory")}
        for remote in (ours, theirs):
            remote.close()
    for name, done in found.items():
        total, seconds, work = (sum(getattr(x, field) for x in done) for field in Round._fields[:3])
        line = f"{name}: {total / seconds:.2f} examples/s over {total}, {work / total:.3g} processor seconds each"
        if name != "jax_it":
            for field in ("seconds", "processor_seconds"):
                ratios = [
                    (getattr(b, field) / b.examples) / (getattr(a, field) / a.examples)
                    for a, b in zip(found["jax_it"], done, strict=True)
                ]
                line += f"; jax_it takes 1/{median(ratios):.2f} of its {field} ({min(ratios):.2f}–{max(ratios):.2f})"
        print(line)
    print(f"jax_it's matmuls at the measured rate would take {median(bounds):.2f} of its time")
    print(", ".join(f"{name} peak memory {size / 1e9:.2f} GB" for name, size in memory.items()))


if __name__ == "__main__":
    main()
