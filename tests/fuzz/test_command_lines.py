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
FLAG = None
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
}  # fmt: skip
GOOD = {
    "--config": "config.py", "--topology": "cpu:2", "--workdir": "run", "--model": "run", "--prompt": "say red 1",
    "--output": "new", "--json": "new.json", "--csv": "new.csv", "--hlo": "new.hlo", "--checkpoint": "45",
    "--max-new-tokens": "2", "--temperature": "1", "--num-return-sequences": "2",
    "--seed": "3", "--stop": "e", "--num": "1",
}  # fmt: skip
REQUIRED = {"preview": 1, "plan": 2, "export": 2, "eval": 1, "generate": 2, "train": 2}
CHANGES = ("", ".", "=", ".x=1", ".train.seed", ".train.seed=\ud800", ".eval.limit=1", ".eval.=1", ".model..path=x")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a finished run, its config, and paths that are not files; each case works on a copy."""
    folder = tiny_run.copy(tiny_run.finished(tmp_path_factory).parent, tmp_path_factory.mktemp("lines") / "work")
    (folder / "file").write_text("x")
    (folder / "in.jsonl").write_text('{"prompt": "say red 1"}\n')
    (folder / "dir").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere/x")
    return folder


def command_line(rng: random.Random) -> list[str]:
    command = rng.choices(list(OPTIONS), (2, 3, 3, 4, 6, 1))[0]
    options = list(OPTIONS[command])
    required, others = options[: REQUIRED[command]], options[REQUIRED[command] :]
    chosen = [option for option in required if rng.random() < 0.97] + rng.sample(
        others, min(len(others), rng.randint(0, 2))
    )
    if "--input" in chosen and "--prompt" in chosen and rng.random() < 0.9:  # they exclude each other
        chosen.remove("--prompt")
    hostile = rng.choice([*chosen, ""])
    words = [command]
    for option in chosen:
        values = OPTIONS[command][option]
        if values is FLAG:
            words.append(option)
            continue
        value = GOOD[option] if option in GOOD and option != hostile else rng.choice(values)
        words += [option, value] if rng.random() < 0.8 else [f"{option}={value}"]
    if rng.random() < 0.15:
        words.append(f"--config{rng.choice(CHANGES)}")
    if rng.random() < 0.05:
        words.insert(
            rng.randrange(len(words) + 1), rng.choice(("--help", "stray", "--", "-h", "-5", "--nope=1", "\ud800"))
        )
    if command == "train":  # one that is not refused takes a step, and takes it once
        words += ["--config.train.duration=1 steps"]
    return words


@fuzz_cases(number=150, short=8)
def test_a_command_line_runs_or_is_refused_in_one_line(seeds, commands, folder, tally):
    def run(seed: int):
        work = folder.with_name(str(seed))
        shutil.copytree(folder, work, symlinks=True)
        os.mkfifo(work / "fifo")
        before = set(work.iterdir())
        words = command_line(random.Random(seed))
        result = commands.run(*words, cwd=work, timeout=120, HOME=str(work))
        left = {file.name for file in work.iterdir()} - {file.name for file in before}
        reports = any(word.startswith(("--json", "--csv")) for word in words)  # the first may be whole, the other fail
        kept = result.kind == "ran" or reports
        left = {name for name in left if not kept or name.startswith(".")}
        shutil.rmtree(work)
        return "fault" if left else result.kind, f"seed {seed}: left {left}, {result}"

    tally(run(seed) for seed in seeds)


def test_the_options_are_those_of_the_commands(commands):
    for command, options in OPTIONS.items():
        text = commands.run(command, "--help").out
        assert all(f"{option} " in text or f"{option}]" in text for option in options), command
