"""Command lines of random options with hostile values: each runs, or is refused in one line."""

import os
import random
import shutil

import pytest

from tests import tiny_run
from tests.fuzz.seeds import fuzz_cases

NUMBERS = (
    "0", "-1", "-5", "1", "2", "4294967296", "1" + "0" * 400, "9" * 5000, "nan", "inf", "-inf", "1e-40",
    "1e300", "1e", "²",
    "٣", "0x10", "1_0", " 1", "+1", "", "None", "1.5",
)  # fmt: skip
TEXTS = (
    "", " ", "say red 1", "\x00", "a\nb", "ü☃", "\udcff", "\ud800", r"\n", "\\", "-", "--", "%s {x} {{y}}",
    "</s>", "x" * 3000,
)  # fmt: skip
PATHS = (
    "", ".", "~", "~nouser", "~nouser/x", "file", "file/x", "dir", "fifo", "loop", "loop/x", "dangling",
    "gs://bucket/x",
    "gs:/bucket", "s3://x", "az://x/y", "file:///tmp", "://", "a\x00b", "a\nb", "\udcff", "x" * 256, "y" * 250,
    "é" * 128,
    "/dev/null", "/dev/full", "/proc/x", "nowhere/x", "in.jsonl", "-x", "new", "new.jsonl", "*", "[",
    "config.py", "x" * 5000,
)  # fmt: skip
CONFIGS = (
    "config.py", "config.py:", "config.py:causal", "config.py:gs://x", "config.py:\ud800", "missing.py",
    "file", ":", *PATHS[:12],
)  # fmt: skip
TOPOLOGIES = (
    "",
    "cpu",
    "cpu:0",
    "cpu:2",
    "cpu:99999999",
    "cpu:²",
    "v5e:0x0",
    "v5e:2x2",
    "nope:1",
    "cpu:2:2",
    "\ud800",
    "9" * 500,
)
STEPS = ("latest", "best", "45", "0", "-1", "", "³", "9" * 5000, "\ud800", "../45", "1e1")
TEMPLATES = ("auto", "messages", "nope", "{{prompt}} ||| x", "{{ ||| }}", "|||", *TEXTS)
MODELS = ("run", "a=run", "=run", "a=", "=", "a=b=run", "a/b=run", "\ud800=run", "r\n=run", *PATHS)
HOSTS = ("127.0.0.1", "::1", "::", "", "256.0.0.1", "nowhere.invalid", "127.0.0.1:80", "\ud800", "a\x00b", "x" * 500)
PARTS = ("prompt", "completion", "both", "")
PATTERNS = ("say", "(", "(a+)+$", "[", "\\p{L}", "(?i)X", "\x00", "\ud800", "a{4294967296}", "(?P<x>", "")
ENDPOINTS = (
    "",
    "x",
    "http://",
    "http://[",
    "http://127.0.0.1:99999/v1",
    "ftp://x/",
    "file:///etc",
    "\ud800",
    "http://a b",
)
ADDRESSES = ("", "local", "x", "127.0.0.1:1", "\ud800", "ray://")
FLAG = None
DATA = {"FILE": PATHS, "--template": TEMPLATES, "--num-workers": NUMBERS, "--ray": ADDRESSES}
OUTPUT = {"--output": PATHS, "--on-invalid": ("drop", "error", "")}
OPTIONS = {  # of each command its options and what they take; those that must be there come first
    "preview": {"--config": CONFIGS, "--num": NUMBERS},
    "plan": {
        "--config": CONFIGS, "--topology": TOPOLOGIES, "--slices": NUMBERS, "--rows": NUMBERS, "--json": PATHS,
        "--hlo": PATHS,
    },
    "export": {
        "--workdir": PATHS, "--output": PATHS, "--checkpoint": STEPS, "--dtype": ("float32", "int8", ""),
        "--adapter-only": FLAG,
    },
    "eval": {
        "--workdir": PATHS, "--checkpoint": STEPS, "--config": CONFIGS, "--output": PATHS, "--json": PATHS,
        "--csv": PATHS,
        "--timeout": NUMBERS, "--summary": FLAG, "--model": PATHS, "--run-model-code": FLAG, "--run-metric-code": FLAG,
    },
    "generate": {
        "--model": PATHS, "--prompt": TEXTS, "--input": PATHS, "--output": PATHS, "--max-new-tokens": NUMBERS,
        "--min-new-tokens": NUMBERS, "--num-beams": NUMBERS, "--length-penalty": NUMBERS, "--temperature": NUMBERS,
        "--top-k": NUMBERS, "--top-p": NUMBERS, "--min-p": NUMBERS, "--repetition-penalty": NUMBERS,
        "--num-return-sequences": NUMBERS,
        "--seed": NUMBERS, "--forced-bos-token": TEXTS, "--stop": TEXTS, "--batch-size": NUMBERS, "--logprobs": FLAG,
        "--early-stopping": ("no", "yes", "never", ""), "--template": TEMPLATES, "--system": TEXTS, "--raw": FLAG,
        "--chat": FLAG,
    },
    "train": {"--config": CONFIGS, "--workdir": PATHS},
    # The last model is not there, as a server that is not refused would not end.
    "serve": {
        "--model": MODELS, "--adapter": MODELS, "--host": HOSTS, "--port": NUMBERS, "--api-key-file": PATHS,
        "--cors-origin": TEXTS, "--batch-size": NUMBERS, "--max-new-tokens": NUMBERS, "--max-prompt-tokens": NUMBERS,
        "--max-queue": NUMBERS, "--request-timeout": NUMBERS, "--drain-timeout": NUMBERS, "--stream-interval": NUMBERS,
        "--log-prompts": FLAG,
    },
    "data validate": DATA | OUTPUT | {"--fix": FLAG, "--tokenizer": PATHS, "--max-tokens": NUMBERS},
    "data stats": DATA | {"--task": TEXTS, "--json": PATHS, "--html": PATHS},
    "data dedup": DATA | OUTPUT | {
        "--method": ("exact", "near", "semantic", ""), "--on": PARTS, "--keep": TEXTS, "--threshold": NUMBERS,
        "--model": PATHS, "--semantic-threshold": NUMBERS,
    },
    "data decontaminate": DATA | OUTPUT | {"--against": PATHS, "--against-fields": TEXTS, "--mark": FLAG},
    "data filter": DATA | OUTPUT | {
        "--on": PARTS, "--min-characters": NUMBERS, "--max-words": NUMBERS, "--min-tokens": NUMBERS,
        "--tokenizer": PATHS, "--languages": TEXTS, "--match": PATTERNS, "--exclude": PATTERNS,
        "--personal-data": ("email", "phone", "nope", ""), "--phone-region": TEXTS, "--unsafe": FLAG,
        "--unsafe-words": PATHS, "--redact": FLAG, "--min-loss": NUMBERS, "--keep-scores": FLAG,
    },
    "data sample": DATA | OUTPUT | {
        "--number": NUMBERS, "--share": NUMBERS, "--stratify": TEXTS, "--on": PARTS, "--seed": NUMBERS,
        "--split": ("", "train", "validation", "x"), "--validation": NUMBERS, "--test": NUMBERS,
    },
    "data convert": DATA | OUTPUT | {
        "--to": ("same", "prompt_completion", "alpaca", "messages", "sharegpt", ""), "--keep-fields": FLAG,
    },
    "data build": DATA | OUTPUT | {
        "--method": ("self_instruct", "evol_instruct", "answers", "translate", ""), "--endpoint": ENDPOINTS,
        "--model": PATHS, "--api-key-env": TEXTS, "--journal": PATHS, "--number": NUMBERS, "--rounds": NUMBERS,
        "--language": TEXTS, "--temperature": NUMBERS, "--concurrency": NUMBERS, "--input-price": NUMBERS,
    },
    "data run": {"FILE": CONFIGS, "--num-workers": NUMBERS, "--ray": ADDRESSES},
    "data tokenize": {"--config": CONFIGS, "--output": PATHS},
}  # fmt: skip
GOOD = {
    "--config": "config.py", "--topology": "cpu:2", "--workdir": "run", "--model": "run", "--prompt": "say red 1",
    "--output": "new", "--json": "new.json", "--csv": "new.csv", "--hlo": "new.hlo", "--checkpoint": "45",
    "--max-new-tokens": "2", "--temperature": "1", "--num-return-sequences": "2",
    "--seed": "3", "--stop": "e", "--num": "1", "FILE": "pairs.jsonl", "--adapter": "a=run", "--port": "0",
}  # fmt: skip
DATA_GOOD = GOOD | {"--output": "new.jsonl", "--temperature": "0", "--json": "new.json"}
REQUIRED = {"preview": 1, "plan": 2, "export": 2, "eval": 1, "generate": 2, "train": 2, "serve": 1, "data tokenize": 2}
WEIGHTS = {"preview": 2, "plan": 3, "export": 3, "eval": 4, "generate": 6, "serve": 3}
CHANGES = ("", ".", "=", ".x=1", ".train.seed", ".train.seed=\ud800", ".eval.limit=1", ".eval.=1", ".model..path=x")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a finished run, its config, and paths that are not files; each case works on a copy."""
    folder = tiny_run.copy(tiny_run.finished(tmp_path_factory).parent, tmp_path_factory.mktemp("lines") / "work")
    (folder / "file").write_text("x")
    (folder / "in.jsonl").write_text('{"prompt": "say red 1"}\n')
    (folder / "pairs.jsonl").write_text('{"prompt": "say red 1", "completion": "red 1"}\n' * 20)
    (folder / "dir").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere/x")
    return folder


def command_line(rng: random.Random) -> list[str]:
    command = rng.choices(list(OPTIONS), [WEIGHTS.get(name, 1) for name in OPTIONS])[0]
    good = DATA_GOOD if command.startswith("data") else GOOD
    options, number = list(OPTIONS[command]), REQUIRED.get(command, 1)
    required, others = options[:number], options[number:]
    chosen = [option for option in required if rng.random() < 0.97] + rng.sample(
        others, min(len(others), rng.randint(0, 2))
    )
    if "--input" in chosen and "--prompt" in chosen and rng.random() < 0.9:  # they exclude each other
        chosen.remove("--prompt")
    hostile = rng.choice([*chosen, ""])
    words = command.split()
    for option in chosen:
        values = OPTIONS[command][option]
        if values is FLAG:
            words.append(option)
            continue
        value = good[option] if option in good and option != hostile else rng.choice(values)
        if not option.startswith("--"):
            words.append(value)
        else:
            words += [option, value] if rng.random() < 0.8 else [f"{option}={value}"]
    if rng.random() < 0.15:
        words.append(f"--config{rng.choice(CHANGES)}")
    if rng.random() < 0.05:
        words.insert(
            rng.randrange(len(words) + 1), rng.choice(("--help", "stray", "--", "-h", "-5", "--nope=1", "\ud800"))
        )
    if command == "train":  # one that is not refused takes a step, and takes it once
        words += ["--config.train.duration=1 steps"]
    if command == "serve":
        words += ["--model", "missing=nowhere"]
    return words


@fuzz_cases(number=250, short=8)
def test_a_command_line_runs_or_is_refused_in_one_line(seeds, commands, folder, tally):
    def run(seed: int):
        work = folder.with_name(str(seed))
        shutil.copytree(folder, work, symlinks=True)
        os.mkfifo(work / "fifo")
        before = set(work.iterdir())
        words = command_line(random.Random(seed))
        result = commands.run(*words, cwd=work, timeout=120, HOME=str(work))
        left = {file.name for file in work.iterdir()} - {file.name for file in before}
        reports = any(
            word.startswith(("--json", "--csv", "--journal")) for word in words
        )  # the first may be whole, the other fail
        kept = result.kind == "ran" or reports
        left = {name for name in left if not kept or name.startswith(".")}
        shutil.rmtree(work)
        return "fault" if left else result.kind, f"seed {seed}: left {left}, {result}"

    tally(run(seed) for seed in seeds)


def test_the_options_are_those_of_the_commands(commands):
    for command, options in OPTIONS.items():
        text = commands.run(*command.split(), "--help").out
        assert all(f"{option} " in text or f"{option}]" in text for option in options if option != "FILE"), command
