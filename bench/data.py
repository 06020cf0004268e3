"""Tokens per second from JSON lines to packed rows: jax_it against `datasets.map` and TRL's packing.

    python bench/data.py --data data/t0/train.jsonl.gz --model HuggingFaceTB/SmolLM2-135M-Instruct
    python bench/data.py … --records 2000 --rounds 1                                                 # a quick look

Both sides read the same conversations, render the tokenizer's chat template, tokenize, and pack rows of 1,024 tokens,
into an empty cache, on one core and then on all. The peer does as TRL's SFTTrainer: `apply_chat_template` of each
example in `Dataset.map`, then `trl.pack_dataset`, whose best-fit packing is its default; without TRL it only tokenizes.
Each side has a process of its own, bound to its cores; rounds alternate. The limit is the tokenizer alone, given
rendered texts in one list on the same cores.
"""

import argparse
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from generate import draw
from measure import Remote, Seconds, machine, ratio, timed

LENGTH = 1024  # tokens of a row


class Side:
    """What the sides share: the cores that they run on, and the file that they read."""

    def __init__(self, file: str, model: str, cores: int):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        self._file, self._model, self._cores = file, model, cores

    def take(self) -> tuple[int, Seconds]:
        """Return how many tokens there are, and how long it took."""
        tokens: list[int] = []
        with tempfile.TemporaryDirectory() as cache:
            seconds = timed(lambda: tokens.append(self.run(cache)))
        return tokens[0], seconds

    def run(self, cache: str) -> int:
        """Read the file, render, tokenize and pack; return the number of tokens."""
        raise NotImplementedError


class Ours(Side):
    """jax_it, from a config to the first batch."""

    def run(self, cache: str) -> int:
        from jax_it import config, sharding
        from jax_it.run import start_run

        rows = {"max_seq_length": LENGTH, "num_workers": self._cores if self._cores > 1 else 0}
        data = {"train": [{"path": self._file}], "cache_dir": cache, **rows}
        mine = config.resolve({"model": {"path": self._model}, "data": data})
        run = start_run(mine, sharding.make_mesh(mine.mesh))
        assert run.data
        run.data.train.batch(0)
        return sum(int(made.target_ends[-1]) for (made,) in run.data.tokenized)


class Theirs(Side):
    """datasets and TRL."""

    def run(self, cache: str) -> int:
        import datasets
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(self._model)

        def tokenize(example: dict[str, Any]) -> dict[str, Any]:
            ids = tokenizer.apply_chat_template(example["messages"], tokenize=True, return_dict=True)["input_ids"]
            return {"input_ids": ids[:LENGTH]}

        workers = self._cores if self._cores > 1 else None
        rows = datasets.load_dataset("json", data_files=self._file, split="train", cache_dir=cache)
        rows = rows.map(tokenize, remove_columns=rows.column_names, num_proc=workers)
        tokens = sum(map(len, rows["input_ids"]))
        try:
            from trl import pack_dataset
        except ImportError:
            return tokens
        pack_dataset(rows.with_format("arrow"), LENGTH, map_kwargs={"num_proc": workers})
        return tokens


class Limit(Side):
    """The tokenizer alone."""

    def run(self, cache: str) -> int:
        import tokenizers

        if not hasattr(self, "_texts"):
            records = map(json.loads, Path(self._file).read_text().splitlines())
            self._texts = ["\n".join(turn["content"] for turn in record["messages"]) for record in records]
            self._tokenizer = tokenizers.Tokenizer.from_file(str(Path(self._model) / "tokenizer.json"))
        return sum(len(each.ids) for each in self._tokenizer.encode_batch_fast(self._texts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="lines of {prompt, completion}, .jsonl or .jsonl.gz")
    parser.add_argument(
        "--model", required=True, help="a folder in Transformers format, whose tokenizer has a template"
    )
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(machine(), flush=True)
    all_cores, rates = len(os.sched_getaffinity(0)), dict[str, float]()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "conversations.jsonl"
        turns = (
            [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record["completion"]}]
            for record in draw(options.data, options.records, 0)
        )
        file.write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
        for cores in dict.fromkeys((1, all_cores)):
            makes = {"jax_it": Ours, "peer": Theirs, "tokenizer alone": Limit}
            remotes = {name: Remote(partial(make, str(file), options.model, cores)) for name, make in makes.items()}
            found: dict[str, list[Seconds]] = {name: [] for name in remotes}
            tokens = dict[str, int]()
            for round_ in range(options.rounds + 1):  # the first one imports
                for name, remote in remotes.items():
                    tokens[name], seconds = remote.call("take")
                    found[name] += [seconds] if round_ else []
            for remote in remotes.values():
                remote.close()
            for name, each in found.items():
                rate = tokens[name] / median(seconds.wall for seconds in each)
                line = f"{cores} cores, {name}: {rate / 1e3:.0f} thousand tokens/s ({tokens[name]} tokens)"
                if name == "jax_it":
                    rates[str(cores)] = rate
                else:
                    share = tokens["jax_it"] / tokens[name]  # templates and cuts differ: a ratio is of equal tokens
                    line += f"; takes {ratio(found['jax_it'], [s.times(share) for s in each])} of jax_it's time"
                print(line, flush=True)
    print(f"jax_it on {all_cores} cores over 1: {rates[str(all_cores)] / rates['1']:.2f}")


if __name__ == "__main__":
    main()
