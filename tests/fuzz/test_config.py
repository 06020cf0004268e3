"""Settings at and beyond their edges, and config files that are none, through `jax-it preview` and `jax-it train`.

Every setting is drawn from the dataclasses themselves, so that a new one is tried without a line here. Most cases go
through `preview`, which refuses all that `train` does before its first step; a tenth trains for two steps.
"""

import dataclasses
import json
import random
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

from jax_it import config as settings
from jax_it import data
from jax_it.config.checks import RANGES
from jax_it.data import tokenizer_files as tokenizers
from tests.fuzz.commands import Kind, Result
from tests.fuzz.seeds import fuzz_cases
from tests.tiny_run import CONFIG, write_recipe

Override = tuple[str, str]  # "train.seed", "7"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe, with a tokenizer that is trained already."""
    folder = tmp_path_factory.mktemp("recipe")
    write_recipe(folder)
    texts = data.texts(settings.load(str(folder / "config.py")).data.train)
    (folder / "tokenizer").mkdir()
    tokenizers.train(texts, 120).save(folder / "tokenizer")
    text = CONFIG.replace('config.model.tokenizer = "train"', 'config.model.tokenizer = str(HERE / "tokenizer")')
    (folder / "config.py").write_text(text.replace("    config.model.tokenizer_size = 120\n", ""))
    return folder


# Settings


def leaves(kind: type, prefix: str = "") -> Iterator[tuple[str, Any, type]]:
    """(name, declared type, the dataclass that has it) of every setting that the tiny recipe has."""
    for name, hint in typing.get_type_hints(kind).items():
        path = f"{prefix}.{name}".removeprefix(".")
        if dataclasses.is_dataclass(hint) and hint is not settings.Duration:
            yield from leaves(typing.cast(type, hint), path)
            continue
        yield path, hint, kind
        if typing.get_args(hint)[:1] == (settings.Source,):
            yield from leaves(settings.Source, f"{path}.0")


SETTINGS = list(leaves(settings.Config))
WRONG = (
    "", " ", "None", "none", "null", "nan", "inf", "-inf", "-", "abc", "[1]", "{}", "[", "[" * 300, "(" * 5000,
    "{'a': 1}", "[None]", "b'x'", "1j", "...", "1 2", "0x", "½", "٣", "é", "\u2028", "\n", "'", "\\d", "{{x}}",
    "a\0b", "\udcff", "\ud800",
)  # fmt: skip
NUMBERS = (
    "0", "1", "2", "3", "5", "-1", "-2", "1.5", "0.5", "-0.5", "1e-3", "1e-12", "1e-300", "-1e-300", "1e-400", "1e3",
    "1e12", "1e300", "1e400", "-1e400", "0.999", "0.9999999999999999", "1.0", "True", "0x10", "1_000", " 5 ", "007",
    "+3", "9" * 400, "-" + "9" * 400, "9" * 5000, "0." + "3" * 400, str(2**31 - 1), str(2**31), str(2**32),
    str(2**63), str(-(2**63) - 1),
)  # fmt: skip
DURATIONS = (
    "1 steps", "2 steps", "0.1 steps", "1e-12 steps", "1e-300 epochs", "1 epoch", "1e3 epochs", "1e6 epochs",
    "1e300 epochs", "-1 steps", "5%", "100%", "101%", "1e9%", "0", "0%", "1e9 tokens", "1e18 tokens", "3 weeks",
    "nan steps", "inf steps", "steps", "1e 3 steps", "1e12 examples", "9" * 400, "9" * 400 + " steps", "1.2.3 steps",
    "٣ steps", "5 5", "1e-12%",
)  # fmt: skip
TEXTS = (
    "x", "bytes", "loss", "auto", "/dev/null", "/dev/zero", "/dev/full", "nowhere.jsonl", "say.jsonl", "tokenizer",
    "config.py", "*.jsonl", "**", "[", "x" * 256, "x" * 5000, "/".join(["x"] * 3000), "ü", "gs://", "gs://bucket/x",
    "ftp://a/b", "~nouser/x", "builtin:instructions", "builtin:", "say.jsonl/", "\t", "{{prompt}} ||| {{completion}}",
    "{{prompt}}", "{{", "{% for %}", "rougeL", "file.py:f", "exact_match",
)  # fmt: skip
# Sizes up to which a preview of the tiny recipe takes no time and no memory to speak of.
LARGE = {"max_source_length", "max_target_length", "max_seq_length", "packed_source_length", "packed_target_length"}


def value(rng: random.Random, name: str, hint: Any, owner: type) -> str:
    """A text for a setting: mostly of its type, near an edge of what is allowed or beyond it."""
    if rng.random() < 0.15:
        return rng.choice(WRONG + NUMBERS + DURATIONS + TEXTS)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is settings.Duration:
        return rng.choice(DURATIONS)
    if origin is Literal:
        return rng.choice([*args, *args, args[0].upper(), args[-1] + " ", "None", "5"])
    if hint is bool:
        return rng.choice(["true", "false", "True", "FALSE", "yes", "1", "0", "on", "", "None"])
    if origin is types.UnionType or hint in (int, float):
        allowed = RANGES[owner][name.rpartition(".")[2]]
        edges: list[float] = [allowed.least, allowed.least - 1, allowed.least + 1, allowed.most + 1]
        edges += [allowed.most] if name.rpartition(".")[2] not in LARGE else [64, 96, 33]
        if hint is int:
            edges = [int(edge) for edge in edges]
        return rng.choice([*map(repr, edges), *map(repr, edges), *NUMBERS, "None"])
    if origin is Mapping:
        return rng.choice(
            ["{}", "{'model_type': 't5'}", "{'model_type': None}", "{1: 2}", "[]", "{'a': {'b': [1, 2, {3}]}}"]
        )
    if args[:1] == (str,):
        return rng.choice(
            [*TEXTS, "[]", "['a', 'b']", "['a', 5]", "[['a']]", "('a',)", "['exact_match', 'exact_match']"]
        )
    if origin is tuple:
        items = [
            "{'path': 'say.jsonl'}",
            "{'path': 5}",
            "{}",
            "{'path': 'say.jsonl', 'limit': -1}",
            "{'nosuch': 1}",
            "5",
        ]
        items += ["{'name': 'a', 'data': {'path': 'say.jsonl'}, 'metrics': ['exact_match']}", "{'name': 'a/b'}"]
        return "[" + ", ".join(rng.choice(items) for _ in range(rng.randrange(4))) + "]"
    return rng.choice(TEXTS)


def overrides(rng: random.Random) -> list[Override]:
    made = []
    for name, hint, owner in rng.sample(SETTINGS, rng.choice([1, 1, 2, 3])):
        text = value(rng, name, hint, owner)
        if rng.random() < 0.06:
            name = rng.choice(
                [f"{name}.x", f".{name}", f"{name}.", name.upper(), f"{name}.0", f"{name}[0]", name + "é", ""]
            )
        if not (
            name == "data.cache_dir" and text.startswith(("/", "~"))
        ):  # nothing is written outside of the test's folder
            made.append((name, text))
    return made


# Config files

PLAIN = (
    "", "{", "\0", "\xff", "import nosuch", "raise SystemExit(0)", "import sys\nsys.exit()", "raise GeneratorExit",
    "import os\nos.kill(os.getpid(), 0)\nget_config = None", "def get_config(): pass",
    "def get_config(arg=''): return None", "def get_config(arg=''): yield 1",
    "async def get_config(arg=''): return {}", "class get_config(dict): pass", "get_config = dict",
    "get_config = str", "get_config = lambda arg: [1]", "get_config = lambda arg: 5", "x = " + "[" * 3000,
    "x = " + "-" * 100000 + "1", "def get_config(arg=''): return get_config(arg)", "get_config = lambda arg: {1: 2}",
    "get_config = lambda arg: {'model': 5}", "get_config = lambda arg: {'train': {'seed': object()}}",
    "get_config = lambda arg: type('D', (dict,), {'items': lambda self: 1 / 0})(a=1)",
    "def get_config(arg=''): raise Exception('a\\nb')",
    "class E(Exception):\n    def __str__(self): raise ValueError\ndef get_config(arg=''): raise E",
    "from jax_it import config\nget_config = config.Config", "def get_config(arg=''): raise SystemExit('\\ud800')",
    "from jax_it.errors import Interrupted\nraise Interrupted('x')",
)  # fmt: skip
# After `config = original(arg)`.
CHANGES = (
    "config.data = config", "config.data.train.append(config.data.train)", "config.data.train[0]['template'] = [[1]]",
    "config.train.seed = config.train.get_ref('seed')",
    "config.model.architecture['deep'] = config.model.architecture",
    "config.data.train = config.data.get_ref('seed')", "config.train.duration = float('nan')", "config.train = None",
    "config.train.batch_size = 10 ** 5000", "config.train.batch_size = True", "config.train.batch_size = 8.0",
    "config.data.train[0]['path'] = b'x'", "config.data.train[0]['path'] = HERE / 'say.jsonl'",
    "config.eval.metrics = {'bleu'}", "config.eval.metrics = 'bleu'", "config.eval.metrics = (m for m in ['bleu'])",
    "config.train.optimizer = 'adamw'", "config.train.optimizer.learning_rate = '1e-3'",
    "config.train.optimizer.learning_rate = 1e-3 + 0j", "import numpy\nconfig.train.seed = numpy.int64(3)",
    "import numpy\nconfig.train.max_grad_norm = numpy.float32(1)",
    "import numpy\nconfig.train.loss = numpy.array(['a', 'b'])",
    "config.model.architecture['d_model'] = {16}", "config.model.architecture[5] = 1",
    "config.model.architecture['d_model'] = float('inf')", "config.model.path = '\\ud800'",
    "config.lock()\nconfig.nosuch = 1", "config.nosuch = 1", "config['data']['train'] = {}",
    "config.data.train = [None]", "config.data.train = 'say.jsonl'", "del config.train",
    "del config.model.architecture", "config.mesh.data = 0", "print('hello')", "config = config.to_dict()",
    "import json\nconfig = json.loads(config.to_json_best_effort())",
    "for _ in range(9999): config = {'data': config}", "config.model.architecture['x'] = 'é' * 100000",
)  # fmt: skip


def config_file(rng: random.Random, folder: Path) -> Path:
    """A config file that is none, that is the recipe with bytes changed, or that changes what the recipe returns."""
    file = folder / f"case{rng.randrange(10**9)}.py"
    source = (folder / "config.py").read_bytes()
    kind = rng.randrange(4)
    if kind == 0:
        file.write_bytes(rng.choice(PLAIN).encode("latin-1", errors="replace"))
    elif kind == 1:
        body = bytearray(source)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(body))
            body[at : at + rng.choice([0, 1, 1, 3])] = rng.choice(
                [b"", b"\0", b"\xff", b"(", b"'", b"9", b"\n", b"    ", b"e"]
            )
        file.write_bytes(bytes(body))
    else:
        lines = "\n".join(rng.sample(CHANGES, rng.choice([1, 1, 2]))).replace("\n", "\n    ")
        file.write_bytes(
            source.replace(b"def get_config", b"def original")
            + f"\n\ndef get_config(arg=''):\n    config = original(arg)\n    {lines}\n    return config\n".encode()
        )
    return file


# The oracle


# What a refusal may say in the place of a setting's name.
CALLED = {
    **dict.fromkeys(("max_source_length", "max_target_length", "max_seq_length"), "truncated"),
    **dict.fromkeys(("path", "format", "template", "records"), ".jsonl"),  # the file that cannot be read so
    "architecture": "encoder-decoder",  # the kind of model that a setting is not for
}


def names_the_fault(line: str, cause: list[Override]) -> bool:
    """Whether a refusal says which of the settings it is about: by its name, the end of that, or its value."""
    if any(words in line for words in (" has no entry ", " has no field ", " is not a setting")):  # of a changed name
        return True
    for name, text in cause:
        section = name.rpartition(".")[0]
        said = (
            name,
            section if section[-1:].isdigit() else "",  # the data set that cannot be read as it is set
            name.rpartition(".")[2],
            repr(text)[1:20].rstrip("'\""),
            " ".join(text.split())[:20],
            CALLED.get(name.rpartition(".")[2]),
        )
        if any(part and part in line for part in said):
            return True
    return False


def holds(run: Path, cause: list[Override]) -> bool:
    """Whether a run's config has the values that were given, as far as they are texts and numbers."""
    saved = json.loads((run / "config.json").read_text())["config"]
    for name, text in cause:
        found: Any = saved
        for key in settings.typed.parts(name):
            found = found[int(key)] if isinstance(found, list) else found[key]
        if isinstance(found, bool):
            same = str(found).lower() == text.lower()
        elif isinstance(found, (int, float)):
            same = float(found) == float(eval(text))
        else:
            same = not isinstance(found, str) or text.split()[:1] == found.split()[:1] or "." in text or "e" in text
        if not same and text.lower() not in ("none", "true", "false"):
            return False
    return True


def judge(result: Result, cause: list[Override], run: Path | None) -> tuple[Kind, str]:
    said = result.err.strip().splitlines()
    if result.kind == "refused" and cause and not names_the_fault(said[-1], cause):
        return "fault", f"it does not say which setting: {cause} {result}"
    if result.kind == "refused" and run and run.exists():
        return "fault", f"it is refused and leaves {sorted(run.rglob('*'))[:5]}: {result}"
    if result.kind == "ran" and run and not (run.exists() and holds(run, cause)):
        return "fault", f"its config does not hold {cause}: {result}"
    return result.kind, str(result)


# Those that decide how long a run of two steps takes.
SLOW = (
    "train.duration",
    "eval.",
    "mesh.",
    "train.step_timeout",
    "data.max_source_length",
    "data.max_target_length",
    "train.profile",
)


@fuzz_cases(1500, short=24)
def test_settings_and_config_files_work_or_are_refused_by_name(seeds, commands, folder, tmp_path, tally):
    def case(seed: int) -> tuple[Kind, str]:
        rng = random.Random(seed)
        config, cause = folder / "config.py", overrides(rng)
        if rng.random() < 0.2:
            config, cause = config_file(rng, folder), []
        arg = rng.choice(["", ":causal"])
        run = tmp_path / f"run{seed}" if seed % 10 == 0 else None
        if run and config.name == "config.py":
            cause = [item for item in cause if not item[0].startswith(SLOW)] or [("train.seed", rng.choice(NUMBERS))]
        words = [f"--config.{name}={text}" for name, text in cause]
        if run:
            extra = ["--config.train.duration=2 steps"]
            command = ["train", "--config", f"{config}{arg}", "--workdir", run, *words, *extra]
        else:
            command = ["preview", "--config", f"{config}{arg}", *words]
        return judge(commands.run(*command, cwd=folder, timeout=300), cause, run)

    tally(map(case, seeds))
