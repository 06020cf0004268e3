"""Sequences per second of decoding: jax_it's `Engine` against Transformers' `generate` and CTranslate2, same tokens.

    python bench/generate.py --data data/t0/train.jsonl.gz --t5-tokenizer google/t5-v1_1-small \
        --causal HuggingFaceTB/SmolLM2-135M [--json FILE]
    python bench/generate.py … --models t5 --prompts 16 --rounds 1 --batch-sizes 4,16     # a quick look, two minutes

T0's prompts, cut at 512 tokens, go through T5 1.1 small (random weights) and a causal model, greedily, in float32 on
all cores of the CPU. Either each text has 32 new tokens (`fixed`), or as many as the prompt's own completion, at most
128 (`drawn`): jax_it is told each limit, and a peer's batch runs to its longest and is cut. End tokens are suppressed
by `min_new_tokens`. A peer gets prompts sorted by length, pads each batch to its longest, and has the batch size that
is fastest on a sample of these batches; CTranslate2 also the better of one worker with all cores and a worker for each
core. `CTranslate2 int8` has weights of 8 bits, so its texts differ.

Each side has its own process, and only one works at a time. All are warmed up before rounds begin, jax_it by a pass
over all prompts, in which it compiles; rounds alternate, a ratio is of one round, and the median counts. The bound is
the matmul FLOPs of each text's own tokens (no padding; the head for new tokens alone; attention scores that the mask
leaves) over the rate of float32 matmuls of 2048 x 2048 by jax_it's library, measured in every round.

Where a text of Transformers differs, its model says in float64 how far apart the two tokens were at the first
difference, and in float32 what error its logits have there: a tie is a gap within 4 errors.
"""

import argparse
import gzip
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from measure import SIZE, Remote, Seconds, flops_per_second, machine, ratio, timed

LONGEST, FIXED, LONGEST_NEW = 512, 32, 128  # tokens of a prompt, and new ones
TIE = 4  # float errors
SETTINGS = {
    "fixed": f"{FIXED} new tokens each",
    "drawn": f"as many as T0's own completions have, at most {LONGEST_NEW}",
}
NAMES = {"t5": "T5 1.1 small, random weights", "causal": "causal"}


@dataclass(frozen=True)
class Asked:
    """The texts to generate: prompts in random order."""

    prompts: list[list[int]]
    limits: list[int]  # new tokens of each

    @property
    def new_tokens(self) -> int:
        return max(self.limits)


# jax_it. The functions of a side run in its own process.


def generator(model: Any, mesh: Any, asked: Asked) -> Callable[[Any, Asked], list[list[int]]]:
    """Return jax_it's function from a request to its texts, with settings for two cores."""
    from jax_it.generation import Engine, Request, Sampling, Scheduler

    new, slots = asked.new_tokens, min(64, len(asked.prompts))
    engine = Engine(model, mesh, new, slots, Sampling(min_new_tokens=new))

    def texts(params: Any, asked: Asked) -> list[list[int]]:
        scheduler, found = Scheduler(engine.load(params)), dict[int, list[int]]()
        for i, (prompt, limit) in enumerate(zip(asked.prompts, asked.limits, strict=True)):
            scheduler.add_request(Request(i, prompt, max_new_tokens=limit, index=i))
        while scheduler.has_unfinished:
            found |= {output.request_id: output.tokens for output in scheduler.step()}
        return [found[i] for i in range(len(asked.prompts))]

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
        self._generators: dict[str, Callable[[Any, Asked], list[list[int]]]] = {}

    def _listen(self, event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            self._compiling.append(seconds)

    def warm(self, setting: str, request: Asked) -> tuple[int, float]:
        """Compile what the request needs: how many programs that were, and in how many seconds."""
        self._compiling.clear()
        self._generators[setting] = generator(self._model, self._mesh, request)
        self.generate(setting, request)
        return len(self._compiling), sum(self._compiling)

    def generate(self, setting: str, request: Asked) -> tuple[list[list[int]], Seconds]:
        texts: list[list[int]] = []
        seconds = timed(lambda: texts.extend(self._generators[setting](self._params, request)))
        return texts, seconds

    def rate(self) -> float:
        """FLOPs per second of a large matmul."""
        import jax

        matrix = jax.random.normal(jax.random.key(0), (SIZE, SIZE))
        product = jax.jit(lambda a: a @ a)
        return flops_per_second(lambda: product(matrix).block_until_ready())


class Peer:
    """What peers share: batches of prompts of similar length, and the fastest way for each setting."""

    ways: tuple[int, ...] = (1,)  # numbers of workers, which a peer may have

    def __init__(self) -> None:
        self._chosen: dict[str, tuple[int, int]] = {}

    def warm(self, setting: str, request: Asked, sizes: Sequence[int], sample: int) -> dict[tuple[int, int], float]:
        """Sequences per second at each batch size and number of workers, over about `sample` prompts."""
        rates = {}
        for size in sizes:
            batches = batched(request, size)
            number = min(len(batches), max(2, sample // size))
            chosen = [batches[(2 * i + 1) * len(batches) // (2 * number)] for i in range(number)]
            for workers in self.ways:
                self.run(request, chosen[-1:], workers)
                seconds = timed(partial(self.run, request, chosen, workers))
                rates[size, workers] = sum(map(len, chosen)) / seconds.wall
        self._chosen[setting] = max(rates, key=lambda way: rates[way])
        return rates

    def generate(self, setting: str, request: Asked) -> tuple[list[list[int]], Seconds]:
        (size, workers), texts = self._chosen[setting], dict[int, list[int]]()
        seconds = timed(lambda: texts.update(self.run(request, batched(request, size), workers)))
        return [texts[i][: request.limits[i]] for i in range(len(request.prompts))], seconds

    def run(self, request: Asked, batches: list[list[int]], workers: int) -> dict[int, list[int]]:
        """Return the text of each prompt of the batches."""
        raise NotImplementedError


def batched(request: Asked, size: int) -> list[list[int]]:
    """Return batches of prompt numbers, longest first, so that widths in a batch are similar."""
    order = sorted(range(len(request.prompts)), key=lambda i: -len(request.prompts[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]


class Theirs(Peer):
    """Transformers' model."""

    def __init__(self, folder: str):
        import torch
        import transformers

        super().__init__()
        torch.set_num_threads(os.cpu_count() or 1)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        config = transformers.AutoConfig.from_pretrained(folder)
        self._causal = not config.is_encoder_decoder
        auto = transformers.AutoModelForCausalLM if self._causal else transformers.AutoModelForSeq2SeqLM
        self._model = auto.from_pretrained(folder, dtype=torch.float32).eval()
        self._exact: Any = None  # the model in float64
        self._pad = config.pad_token_id or 0

    def run(self, request: Asked, batches: list[list[int]], workers: int) -> dict[int, list[int]]:
        return {i: text for batch in batches for i, text in zip(batch, self._batch(request, batch), strict=True)}

    def _batch(self, request: Asked, batch: Sequence[int]) -> list[list[int]]:
        import torch

        width = max(len(request.prompts[i]) for i in batch)
        new_tokens = max(request.limits[i] for i in batch)
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


class CTranslate2(Peer):
    """CTranslate2's model, converted from the folder."""

    ways = (1, os.cpu_count() or 1)

    def __init__(self, folder: str, compute_type: str):
        import ctranslate2
        import transformers
        from ctranslate2.converters import TransformersConverter

        super().__init__()
        self._causal = not transformers.AutoConfig.from_pretrained(folder).is_encoder_decoder
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        kind = ctranslate2.Generator if self._causal else ctranslate2.Translator
        with tempfile.TemporaryDirectory() as converted:
            TransformersConverter(folder).convert(converted, quantization=compute_type, force=True)
            self._models = {
                workers: kind(
                    converted, "cpu", compute_type=compute_type, inter_threads=workers,
                    intra_threads=(os.cpu_count() or 1) // workers,
                )
                for workers in dict.fromkeys(self.ways)
            }  # fmt: skip

    def run(self, request: Asked, batches: list[list[int]], workers: int) -> dict[int, list[int]]:
        model, waiting = self._models[workers], []
        for batch in batches:
            new = max(request.limits[i] for i in batch)
            prompts = [self._tokenizer.convert_ids_to_tokens(request.prompts[i]) for i in batch]
            if self._causal:
                waiting += model.generate_batch(
                    prompts, sampling_topk=1, min_length=new, max_length=new, include_prompt_in_result=False,
                    asynchronous=True,
                )  # fmt: skip
            else:
                waiting += model.translate_batch(
                    prompts, beam_size=1, min_decoding_length=new, max_decoding_length=new, asynchronous=True,
                    max_input_length=0,
                )  # fmt: skip
        results = [each.result() for each in waiting]
        if self._causal:
            texts = [each.sequences_ids[0] for each in results]
        else:
            texts = [self._tokenizer.convert_tokens_to_ids(each.hypotheses[0]) for each in results]
        return dict(zip((i for batch in batches for i in batch), texts, strict=True))


# What is asked for, and what it takes at least.


def draw(file: str, number: int, seed: int) -> list[dict[str, str]]:
    """Records of T0, of those that have a completion."""
    opened = gzip.open if file.endswith(".gz") else open
    with opened(file, "rt", encoding="utf-8") as lines:
        records = [record for record in map(json.loads, lines) if record["completion"].strip()]
    return [records[i] for i in np.random.default_rng(seed).choice(len(records), number, replace=False)]


def requests(records: list[dict[str, str]], tokenizer: Any, ends: list[int]) -> dict[str, Asked]:
    """The two settings. `ends`: the mark at a prompt's end, of an encoder-decoder."""
    prompts = [
        [*tokens[: LONGEST - len(ends)], *ends] for tokens in tokenizer.encode([record["prompt"] for record in records])
    ]
    completions = tokenizer.encode([record["completion"] for record in records])
    lengths = [min(len(tokens) + 1, LONGEST_NEW) for tokens in completions]  # the end token is generated too
    return {"fixed": Asked(prompts, [FIXED] * len(prompts)), "drawn": Asked(prompts, lengths)}


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
    """One side and what was measured of it in one setting."""

    name: str
    remote: Remote
    texts: list[list[int]] = field(default_factory=list)
    seconds: list[Seconds] = field(default_factory=list)

    def take(self, setting: str, request: Asked) -> None:
        texts, seconds = self.remote.call("generate", setting, request)
        assert not self.texts or texts == self.texts, f"{self.name}: another round gave other texts"
        self.texts = texts
        self.seconds.append(seconds)


def compare(ours: Side, theirs: Side, request: Asked) -> str:
    """Say how many texts are the same, and whether those of Transformers that are not differ at a tie."""
    pairs = list(zip(ours.texts, theirs.texts, strict=True))
    different = [i for i, (mine, other) in enumerate(pairs) if mine != other]
    said = f"{1 - len(different) / len(pairs):.1%} of texts the same"
    if theirs.name != "Transformers":
        return said
    tied = 0
    for i in different:
        mine, other = pairs[i]
        assert len(mine) == len(other) == request.limits[i], "a text has not the length that was asked for"
        at = next(k for k in range(len(mine)) if mine[k] != other[k])
        gap, error = theirs.remote.call("gap", request.prompts[i], mine[:at], mine[at], other[at])
        tied += gap <= TIE * error
    return f"{said}, {tied} of the {len(different)} others differ at a tie"


def measure(setting: str, request: Asked, sides: list[Side], values: dict[str, Any], options: Any) -> dict[str, Any]:
    """Measure one setting of one model, all sides in turn, and print what is to be said of it."""
    ours, *peers = sides
    programs, compiling = ours.remote.call("warm", setting, request)
    tried = {
        side.name: side.remote.call("warm", setting, request, options.batch_sizes, options.sample) for side in peers
    }
    rates = []
    for _ in range(options.rounds):
        rates.append(ours.remote.call("rate"))
        for side in sides:
            side.take(setting, request)
    number, new = len(request.prompts), request.limits
    needed = mean(flops(values, len(p), limit) for p, limit in zip(request.prompts, new, strict=True))
    bound = median(rates) / needed
    print(
        f"{setting}: {SETTINGS[setting]} (mean {mean(new):.1f}, median {median(new):g}, longest {max(new)}); "
        f"{needed / 1e9:.2f} GFLOP a sequence, {median(rates) / 1e9:.0f} GFLOP/s: at most {bound:.1f} sequences/s\n"
        f"  jax_it compiled {programs} programs in {compiling:.1f} s, before the rounds"
    )
    found: dict[str, Any] = {"setting": setting, "flops": needed, "bound": bound, "compiling": [programs, compiling]}
    for side in sides:
        rate = number / median(each.wall for each in side.seconds)
        found[side.name] = {"sequences_per_second": rate, "seconds": side.seconds}
        line = f"  {side.name}: {rate:.2f} sequences/s, {rate / bound:.1%} of the bound"
        if side is not ours:
            size, workers = max(tried[side.name], key=lambda way: tried[side.name][way])
            line += (
                f", {size} at a time, {workers} workers; takes {ratio(ours.seconds, side.seconds)} of jax_it's time; "
                f"{compare(ours, side, request)}"
            )
        print(line, flush=True)
    return found


PEERS: dict[str, Callable[[str], Any]] = {
    "Transformers": Theirs,
    "CTranslate2": partial(CTranslate2, compute_type="float32"),
    "CTranslate2 int8": partial(CTranslate2, compute_type="int8"),
}


def run(name: str, folder: str, built: dict[str, Asked], options: Any) -> list[dict[str, Any]]:
    """Measure all settings of one model."""
    values = json.loads((Path(folder) / "config.json").read_text())
    lengths = [len(prompt) for prompt in built["fixed"].prompts]
    print(
        f"\n{name}: {len(lengths)} prompts of mean {mean(lengths):.0f}, median {median(lengths):g} tokens, "
        f"at most {LONGEST}; float32",
        flush=True,
    )
    makes = {"jax_it": Ours, **{peer: PEERS[peer] for peer in options.peers}}
    remotes = {side: Remote(partial(make, folder)) for side, make in makes.items()}
    found = []
    for setting in options.settings:
        sides = [Side(side, remote) for side, remote in remotes.items()]
        found.append(measure(setting, built[setting], sides, values, options))
    for remote in remotes.values():
        remote.close()
    return found


def write_t5(folder: str, tokenizer: str, seed: int) -> None:
    """Write T5 1.1 small with random weights as a folder in Transformers' format."""
    from jax_it import config, pretrained, sharding
    from jax_it.data import tokenizer_files
    from jax_it.pretrained import hf

    recipe = config.load(f"{Path(__file__).parents[1] / 'configs' / 't0_t5_small.py'}:random")
    hf.save(Path(folder), *pretrained.load(recipe.model, sharding.make_mesh(recipe.mesh), seed))
    tokenizer_files.load(tokenizer).backend.save_pretrained(folder)  # CTranslate2's converter reads it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="lines of {prompt, completion}, .jsonl or .jsonl.gz")
    parser.add_argument("--t5-tokenizer", default="google/t5-v1_1-small", help="a hub name, folder or spiece.model")
    parser.add_argument("--causal", default="HuggingFaceTB/SmolLM2-135M", help="a folder in Transformers format")
    parser.add_argument("--models", default="t5,causal", type=lambda text: text.split(","))
    parser.add_argument("--settings", default="fixed,drawn", type=lambda text: text.split(","))
    parser.add_argument("--peers", default=",".join(PEERS), type=lambda text: text.split(","))
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-sizes", default="1,2,4,8,16,32,64", type=lambda t: [int(n) for n in t.split(",")])
    parser.add_argument("--sample", type=int, default=32, help="prompts on which each batch size is tried, about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="a file for all figures")
    options = parser.parse_args()
    from jax_it.data import tokenizer_files as tokenizers

    print(machine(), flush=True)
    records = draw(options.data, options.prompts, options.seed)
    found: dict[str, Any] = {"prompts": options.prompts, "seed": options.seed, "cores": os.cpu_count(), "models": {}}
    for model in options.models:
        if model == "t5":
            tokenizer = tokenizers.load(options.t5_tokenizer)
            with tempfile.TemporaryDirectory() as folder:
                process = get_context("spawn").Process(
                    target=write_t5, args=(folder, options.t5_tokenizer, options.seed)
                )
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
