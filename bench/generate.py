"""Sequences per second of decoding: jax_it's `Engine` against Transformers' `generate` in PyTorch, same tokens out.

    python bench/generate.py --data data/t0/train.jsonl.gz --t5-tokenizer google/t5-v1_1-small \
        --causal HuggingFaceTB/SmolLM2-135M [--json FILE]
    python bench/generate.py … --models t5 --prompts 16 --rounds 1 --batch-sizes 4,16     # a quick look, two minutes

T0's prompts, cut at 512 tokens, go through T5 1.1 small (random weights) and a causal model, greedily, in float32 on
all cores of the CPU. Either each text has 32 new tokens (`fixed`), or as many as the prompt's own completion, at most
128 (`drawn`): jax_it is told each limit, and the peer's batch runs to its longest and is cut. End tokens are
suppressed by `min_new_tokens`. The peer sorts prompts by length, pads each batch to its longest, and has the batch
size that is fastest on a sample of these batches.

Each side has its own process, and only one works at a time. Both are warmed up before rounds begin, jax_it by a pass
over all prompts, in which it compiles; rounds alternate, and the median counts. The bound is the matmul FLOPs of each
text's own tokens (no padding; the head for new tokens alone; attention scores that the mask leaves) over the rate of
float32 matmuls of 2048 x 2048, each side's own library, measured in every round.

Where texts differ, the peer's model says in float64 how far apart the two tokens were at the first difference, and in
float32 what error its logits have there: a tie is a gap within 4 errors.
"""

import argparse
import gzip
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from measure import SIZE, Remote, flops_per_second

LONGEST, FIXED, LONGEST_NEW = 512, 32, 128  # tokens of a prompt, and new ones
TIE = 4  # float errors
SETTINGS = {
    "fixed": f"{FIXED} new tokens each",
    "drawn": f"as many as T0's own completions have, at most {LONGEST_NEW}",
}
NAMES = {"t5": "T5 1.1 small, random weights", "causal": "causal"}


@dataclass(frozen=True)
class Request:
    """The texts to generate: prompts in random order."""

    prompts: list[list[int]]
    limits: list[int]  # new tokens of each

    @property
    def new_tokens(self) -> int:
        return max(self.limits)


# jax_it. The functions of a side run in its own process.


def generator(model: Any, mesh: Any, first: Request) -> Callable[[Any, Request], list[list[int]]]:
    """Return jax_it's function from a request to its texts, with settings for two cores."""
    from jax_it.generation import Engine, Sampling, generate

    new, slots = first.new_tokens, min(64, len(first.prompts))
    engine = Engine(model, mesh, new, slots, Sampling(min_new_tokens=new))

    def texts(params: Any, request: Request) -> list[list[int]]:
        outputs = generate(engine, params, request.prompts, request.limits)
        found = {output.request_id: output.tokens for output in outputs}
        return [found[i] for i in range(len(request.prompts))]

    return texts


class Ours:
    """jax_it: the model, and what was compiled for each setting."""

    def __init__(self, folder: str):
        import jax

        from jax_it import config, pretrained, sharding

        self._compiling: list[float] = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        self._mesh = sharding.make_mesh(config.Mesh())
        self._model, self._params = pretrained.load(config.Model(path=folder), self._mesh)
        self._generators: dict[str, Callable[[Any, Request], list[list[int]]]] = {}

    def _listen(self, event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            self._compiling.append(seconds)

    def warm(self, setting: str, request: Request) -> tuple[int, float]:
        """Compile what the request needs: how many programs that were, and in how many seconds."""
        self._compiling.clear()
        self._generators[setting] = generator(self._model, self._mesh, request)
        self.generate(setting, request)
        return len(self._compiling), sum(self._compiling)

    def generate(self, setting: str, request: Request) -> tuple[list[list[int]], float]:
        begin = time.perf_counter()
        texts = self._generators[setting](self._params, request)
        return texts, time.perf_counter() - begin

    def rate(self) -> float:
        """FLOPs per second of a large matmul."""
        import jax

        matrix = jax.random.normal(jax.random.key(0), (SIZE, SIZE))
        product = jax.jit(lambda a: a @ a)
        return flops_per_second(lambda: product(matrix).block_until_ready())


class Theirs:
    """Transformers: the model, and its fastest batch size for each setting."""

    def __init__(self, folder: str):
        import torch
        import transformers

        torch.set_num_threads(os.cpu_count() or 1)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        config = transformers.AutoConfig.from_pretrained(folder)
        self._causal = not config.is_encoder_decoder
        auto = transformers.AutoModelForCausalLM if self._causal else transformers.AutoModelForSeq2SeqLM
        self._model = auto.from_pretrained(folder, dtype=torch.float32).eval()
        self._exact: Any = None  # the model in float64
        self._pad = config.pad_token_id or 0
        self._sizes: dict[str, int] = {}

    def warm(self, setting: str, request: Request, sizes: Sequence[int], sample: int) -> dict[int, float]:
        """Sequences per second at each batch size, over about `sample` prompts of the batches that it makes."""
        rates = {}
        for size in sizes:
            batches = self._batches(request, size)
            number = min(len(batches), max(2, sample // size))
            chosen = [batches[(2 * i + 1) * len(batches) // (2 * number)] for i in range(number)]
            self._batch(request, chosen[-1][:1], 2)
            begin = time.perf_counter()
            for batch in chosen:
                self._batch(request, batch)
            rates[size] = sum(map(len, chosen)) / (time.perf_counter() - begin)
        self._sizes[setting] = max(rates, key=lambda size: rates[size])
        return rates

    def generate(self, setting: str, request: Request) -> tuple[list[list[int]], float]:
        texts: list[list[int]] = [[] for _ in request.prompts]
        begin = time.perf_counter()
        for batch in self._batches(request, self._sizes[setting]):
            for i, text in zip(batch, self._batch(request, batch), strict=True):
                texts[i] = text[: request.limits[i]]
        return texts, time.perf_counter() - begin

    def _batches(self, request: Request, size: int) -> list[list[int]]:
        """Return batches of prompt numbers, longest first, so that widths in a batch are similar."""
        order = sorted(range(len(request.prompts)), key=lambda i: -len(request.prompts[i]))
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _batch(self, request: Request, batch: Sequence[int], new_tokens: int = 0) -> list[list[int]]:
        import torch

        width = max(len(request.prompts[i]) for i in batch)
        new_tokens = new_tokens or max(request.limits[i] for i in batch)
        tokens, mask = np.full((len(batch), width), self._pad), np.zeros((len(batch), width), np.int64)
        for row, i in enumerate(batch):
            prompt = request.prompts[i]
            at = slice(width - len(prompt), width) if self._causal else slice(len(prompt))
            tokens[row, at], mask[row, at] = prompt, 1
        with torch.inference_mode():
            made = self._model.generate(
                input_ids=torch.from_numpy(tokens),
                attention_mask=torch.from_numpy(mask),
                do_sample=False,
                num_beams=1,
                use_cache=True,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=self._pad,
            )
        return made[:, -new_tokens:].tolist()

    def gap(self, prompt: list[int], text: list[int], first: int, second: int) -> tuple[float, float]:
        """By how much the logit of one next token exceeds another's, and the float32 error of logits there."""
        import copy

        import torch

        self._exact = self._exact or copy.deepcopy(self._model).double()
        if self._causal:
            arguments = {"input_ids": torch.tensor([prompt + text])}
        else:
            start = self._model.config.decoder_start_token_id
            arguments = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([[start, *text]])}
        with torch.inference_mode():
            exact, single = (model(**arguments).logits[0, -1].double() for model in (self._exact, self._model))
        return abs(exact[first] - exact[second]).item(), abs(exact - single).max().item()

    def rate(self) -> float:
        """FLOPs per second of a large matmul."""
        import torch

        matrix = torch.randn(SIZE, SIZE)
        return flops_per_second(lambda: matrix @ matrix)


# What is asked for, and what it takes at least.


def draw(file: str, number: int, seed: int) -> list[dict[str, str]]:
    """Records of T0, of those that have a completion."""
    opened = gzip.open if file.endswith(".gz") else open
    with opened(file, "rt", encoding="utf-8") as lines:
        records = [record for record in map(json.loads, lines) if record["completion"].strip()]
    return [records[i] for i in np.random.default_rng(seed).choice(len(records), number, replace=False)]


def requests(records: list[dict[str, str]], tokenizer: Any, ends: list[int]) -> dict[str, Request]:
    """The two settings. `ends`: the mark at a prompt's end, of an encoder-decoder."""
    prompts = [
        [*tokens[: LONGEST - len(ends)], *ends] for tokens in tokenizer.encode([record["prompt"] for record in records])
    ]
    completions = tokenizer.encode([record["completion"] for record in records])
    lengths = [min(len(tokens) + 1, LONGEST_NEW) for tokens in completions]  # the end token is generated too
    return {"fixed": Request(prompts, [FIXED] * len(prompts)), "drawn": Request(prompts, lengths)}


def flops(values: dict[str, Any], source: int, new: int) -> float:
    """Matmul FLOPs of one text: `new` tokens after a prompt of `source`."""
    if values["model_type"] == "t5":
        width, inner, layers = values["d_model"], values["num_heads"] * values["d_kv"], values["num_layers"]
        mlp = (3 if values["feed_forward_proj"].startswith("gated") else 2) * width * values["d_ff"]
        encoder = source * (4 * width * inner + mlp + 2 * source * inner)  # multiplications of a layer
        memory = source * 2 * width * inner
        decoder = new * (6 * width * inner + mlp + 2 * source * inner + (new + 1) * inner)
        return 2 * (layers * (encoder + memory + decoder) + new * width * values["vocab_size"])
    width, heads, layers = values["hidden_size"], values["num_attention_heads"], values["num_hidden_layers"]
    size = values.get("head_dim") or width // heads
    matrices = 2 * width * size * (heads + values["num_key_value_heads"]) + 3 * width * values["intermediate_size"]
    length = source + new - 1  # the last token is not read
    stack = length * (matrices + (length + 1) * heads * size)
    return 2 * (layers * stack + new * width * values["vocab_size"])


# The run.


@dataclass
class Side:
    """One of the two and what was measured of it in one setting."""

    name: str
    remote: Remote
    texts: list[list[int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def take(self, setting: str, request: Request) -> None:
        self.rates.append(self.remote.call("rate"))
        texts, seconds = self.remote.call("generate", setting, request)
        assert not self.texts or texts == self.texts, f"{self.name}: another round gave other texts"
        self.texts = texts
        self.seconds.append(seconds)


def compare(ours: Side, theirs: Side, request: Request) -> dict[str, Any]:
    """How many texts are the same, and whether those that are not differ at a tie."""
    differences = []
    for i, (mine, other) in enumerate(zip(ours.texts, theirs.texts, strict=True)):
        assert len(mine) == len(other) == request.limits[i], "a text has not the length that was asked for"
        if mine != other:
            at = next(k for k in range(len(mine)) if mine[k] != other[k])
            gap, error = theirs.remote.call("gap", request.prompts[i], mine[:at], mine[at], other[at])
            differences.append({"prompt": i, "at": at, "gap": gap, "error": error, "tied": gap <= TIE * error})
    return {
        "same": 1 - len(differences) / len(ours.texts),
        "distinct": len({tuple(text) for text in ours.texts}),
        "differences": differences,
    }


def measure(setting: str, request: Request, sides: tuple[Side, Side], values: dict[str, Any], options: Any) -> Any:
    """One setting of one model: both sides in turn, and what is to be said of it."""
    ours, theirs = sides
    programs, compiling = ours.remote.call("warm", setting, request)
    tried = theirs.remote.call("warm", setting, request, options.batch_sizes, options.sample)
    for _ in range(options.rounds):
        for side in sides:
            side.take(setting, request)
    number = len(request.prompts)
    needed = mean(flops(values, len(p), limit) for p, limit in zip(request.prompts, request.limits, strict=True))
    found: dict[str, Any] = {
        "setting": setting,
        "new_tokens": {"mean": mean(request.limits), "median": median(request.limits), "longest": request.new_tokens},
        "flops": needed,
        "compiled": {"programs": programs, "seconds": compiling},
        "batch_sizes": tried,
        "batch_size": max(tried, key=lambda size: tried[size]),
    }
    for side in sides:
        rate, bound = number / median(side.seconds), median(side.rates) / needed
        found[side.name] = {
            "sequences_per_second": rate,
            "seconds": side.seconds,
            "matmul_flops_per_second": median(side.rates),
            "bound": bound,
            "share": rate / bound,
        }
    found["ratio"] = median(theirs.seconds) / median(ours.seconds)
    return found | {"texts": compare(ours, theirs, request)}


def report(found: dict[str, Any]) -> str:
    new, compiled, texts = found["new_tokens"], found["compiled"], found["texts"]
    lines = [
        f"{found['setting']}: {SETTINGS[found['setting']]} (mean {new['mean']:.1f}, median {new['median']:g}, "
        f"longest {new['longest']}); {found['flops'] / 1e9:.2f} GFLOP a sequence",
        f"  {'':12} {'sequences/s':>11}  {'bound':>6}  {'share':>6}  {'matmul GFLOP/s':>14}  rounds, s",
    ]
    for name in ("jax_it", "Transformers"):
        side = found[name]
        lines.append(
            f"  {name:12} {side['sequences_per_second']:11.2f}  {side['bound']:6.1f}  {side['share']:6.1%}  "
            f"{side['matmul_flops_per_second'] / 1e9:14.0f}  {' '.join(f'{s:.1f}' for s in side['seconds'])}"
        )
    tried = ", ".join(f"{size}: {rate:.2f}" for size, rate in found["batch_sizes"].items())
    differences = texts["differences"]
    lines += [
        f"  ratio {found['ratio']:.2f}",
        f"  Transformers' batch size {found['batch_size']}, of sequences/s on a sample at {tried}",
        f"  jax_it compiled {compiled['programs']} programs in {compiled['seconds']:.1f} s, before the rounds",
        f"  same texts {texts['same']:.2%}, {texts['distinct']} distinct; "
        f"{len(differences)} differ, {sum(d['tied'] for d in differences)} of them at a tie",
    ]
    lines += [
        f"    prompt {d['prompt']}, token {d['at']}: gap {d['gap']:.1e}, float error {d['error']:.1e}"
        for d in differences
    ]
    return "\n".join(lines)


def run(name: str, folder: str, built: dict[str, Request], options: Any) -> list[dict[str, Any]]:
    """All settings of one model."""
    values = json.loads((Path(folder) / "config.json").read_text())
    lengths = [len(prompt) for prompt in built["fixed"].prompts]
    print(
        f"\n{name}: {len(lengths)} prompts of mean {mean(lengths):.0f}, median {median(lengths):g} tokens, "
        f"at most {LONGEST}; {os.cpu_count()} cores, float32",
        flush=True,
    )
    remotes = Remote(partial(Ours, folder)), Remote(partial(Theirs, folder))
    found = []
    for setting in options.settings:
        sides = Side("jax_it", remotes[0]), Side("Transformers", remotes[1])
        found.append(measure(setting, built[setting], sides, values, options))
        print(report(found[-1]), flush=True)
    for remote in remotes:
        remote.close()
    return found


def write_t5(folder: str, seed: int) -> None:
    """T5 1.1 small with random weights, as a folder in Transformers' format."""
    from jax_it import config, pretrained, sharding
    from jax_it.pretrained import hf

    recipe = config.load(f"{Path(__file__).parents[1] / 'configs' / 't0_t5_small.py'}:random")
    hf.save(Path(folder), *pretrained.load(recipe.model, sharding.make_mesh(recipe.mesh), seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="lines of {prompt, completion}, .jsonl or .jsonl.gz")
    parser.add_argument("--t5-tokenizer", default="google/t5-v1_1-small", help="a hub name, folder or spiece.model")
    parser.add_argument("--causal", default="HuggingFaceTB/SmolLM2-135M", help="a folder in Transformers format")
    parser.add_argument("--models", default="t5,causal", type=lambda text: text.split(","))
    parser.add_argument("--settings", default="fixed,drawn", type=lambda text: text.split(","))
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-sizes", default="1,2,4,8,16,32,64", type=lambda t: [int(n) for n in t.split(",")])
    parser.add_argument("--sample", type=int, default=32, help="prompts on which each batch size is tried, about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="a file for all figures")
    options = parser.parse_args()
    from jax_it.data import tokenizer_files as tokenizers

    records = draw(options.data, options.prompts, options.seed)
    found: dict[str, Any] = {"prompts": options.prompts, "seed": options.seed, "cores": os.cpu_count(), "models": {}}
    for model in options.models:
        if model == "t5":
            tokenizer = tokenizers.load(options.t5_tokenizer)
            with tempfile.TemporaryDirectory() as folder:
                process = get_context("spawn").Process(target=write_t5, args=(folder, options.seed))
                process.start()
                process.join()
                found["models"][model] = run(
                    NAMES[model], folder, requests(records, tokenizer, [tokenizer.end]), options
                )
        else:
            built = requests(records, tokenizers.load(options.causal), [])
            found["models"][model] = run(Path(options.causal).name, options.causal, built, options)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
