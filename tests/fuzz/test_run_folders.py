"""Run folders that were damaged: a command refuses them in a line, or does what it does with the undamaged one."""

import json
import math
import os
import random
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from jax_it.run_dir import with_checksum
from tests import tiny_run
from tests.fuzz.commands import Commands, Result
from tests.fuzz.seeds import fuzz_cases

STEPS = 6  # of the run, with checkpoints of steps 2 and 4: as one that was killed at its end
OPTIONS = (
    "--config.train.duration=6 steps", "--config.train.checkpoint_every=2 steps", "--config.train.log_every=3 steps",
    "--config.train.max_to_keep=9", "--config.eval.max_new_tokens=4", "--config.eval.metrics=exact_match",
)  # fmt: skip
PROMPT = ("--prompt", "say red 1", "--max-new-tokens", 4)
KINDS = ("train", "export", "generate", "eval", "summary", "summary")
JSON = ["[]", "null", "{}", '"x"', "1e999", "NaN", "1" * 400, "[" * 100_000, "", "\0\1\2", "\ud83d", "{", "[1, 2]"]
VALUES = [None, math.nan, math.inf, -1, 0, 10**400, "x", "", [], {}, True, 1.5, "1", [[1]], "\ud83d", "a" * 300]


class Base:
    """The undamaged run, the commands on it, and what they do there."""

    def __init__(self, commands: Commands, folder: Path):
        self._commands, self._folder = commands, folder
        self._config = tiny_run.write_recipe(folder / "recipe")
        self.run = folder / "run"
        whole = folder / "whole"
        done = self.command("train", whole, folder)
        assert done.kind == "ran", done
        self.trained = outcome("train", whole, folder, done)
        tiny_run.copy(whole, self.run)
        shutil.rmtree(self.run / "checkpoints" / str(STEPS))
        (self.run / "ended.json").write_text('{"step": 2, "why": "it was stopped"}')
        for step in (2, 4):
            scores = self.run / "eval" / str(step) / "metrics.json"
            scores.parent.mkdir(parents=True)
            found = {"all": {"loss": 5.0 - step, "exact_match": 12.5 * step, "n": 7}}
            scores.write_text(json.dumps(with_checksum(found)))

    def command(self, kind: str, run: Path, folder: Path) -> Result:
        """Runs the command on a run's folder; what it writes elsewhere goes to `folder`."""
        arguments: dict[str, tuple[Any, ...]] = {
            "train": ("train", "--config", self._config, "--workdir", run, *OPTIONS),
            "export": ("export", "--workdir", run, "--output", folder / "export"),
            "generate": ("generate", "--model", run, *PROMPT),
            "eval": ("eval", "--workdir", run),
            "summary": ("eval", "--workdir", run, "--summary"),
        }
        return self._commands.run(*arguments[kind], timeout=300)

    @cache  # noqa: B019
    def expected(self, kind: str, step: int) -> Any:
        """What the command does on the undamaged run whose newest checkpoint is that of `step`."""
        if kind == "train":
            return self.trained
        folder = self._folder / f"{kind}-{step}"
        run = tiny_run.copy(self.run, folder / "run")
        for other in {2, 4} - {step}:
            shutil.rmtree(run / "checkpoints" / str(other))
        done = self.command(kind, run, folder)
        assert done.kind == "ran", done
        return outcome(kind, run, folder, done)


def outcome(kind: str, run: Path, folder: Path, done: Result) -> Any:
    """What a command has made."""
    if kind == "train":
        checksums = json.loads((run / "checkpoints" / str(STEPS) / "checksums" / "metadata").read_text())
        return checksums["params"], checksums["training"], tiny_run.losses(run)
    if kind == "export":
        return {file.name: file.read_bytes() for file in (folder / "export").iterdir()}
    if kind == "eval":
        step = re.match(r"step (\d+)\n", done.out)
        assert step
        return [(run / "eval" / step[1] / name).read_bytes() for name in ("metrics.json", "predictions.jsonl")]
    return done.out


@pytest.fixture(scope="session")
def base(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base(commands, tmp_path_factory.mktemp("base"))


def damage(run: Path, chance: random.Random) -> list[tuple[str, Path]]:
    """Damages one to three of the folder's items; says how, and which."""
    done = []
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        items = sorted(item.relative_to(run) for item in run.rglob("*") if item.name != ".lock")
        # As often one of the few at the top as one of the many in checkpoints.
        depth = chance.randint(1, max(len(item.parts) for item in items))
        item = run / chance.choice([item for item in items if len(item.parts) <= depth])
        how = chance.choice(DAMAGES)
        try:
            other = how(item, chance)
        except (ValueError, OSError):  # of a file, say, and it is a folder: then it is lost
            how, other = delete, None
            delete(item, chance)
        done += [(how.__name__, touched.relative_to(run)) for touched in (item, other) if touched]
    return done


def delete(item: Path, chance: random.Random) -> None:
    shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()


def truncate(item: Path, chance: random.Random) -> None:
    os.truncate(item, int(item.stat().st_size * chance.choice((0, 0.3, chance.random()))))


def flip_bits(item: Path, chance: random.Random) -> None:
    content = bytearray(item.read_bytes())
    for _ in range(chance.choice((1, 1, 8))):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    item.write_bytes(content)


def overwrite(item: Path, chance: random.Random) -> None:
    item.read_bytes()
    item.write_bytes(chance.choice(JSON).encode(errors="surrogatepass"))


def replace(item: Path, chance: random.Random) -> None:
    delete(item, chance)
    if (kind := chance.randrange(6)) == 0:
        item.mkdir()
    elif kind == 1:
        os.mkfifo(item)
    elif kind == 2:
        item.write_bytes(chance.randbytes(100))
    else:
        item.symlink_to([item, Path("nowhere"), Path("/dev/zero")][kind - 3])


def rename(item: Path, chance: random.Random) -> None:
    item.rename(item.with_name(chance.choice(["1", "3", "8", "04", "-4", "x", f"{item.name}.part", f".{item.name}"])))


def swap(item: Path, chance: random.Random) -> Path:
    """Returns the other item."""
    others = [other for other in item.parent.iterdir() if other.is_dir() == item.is_dir() and other != item]
    if not others:
        raise ValueError
    other, aside = chance.choice(sorted(others)), item.with_name("aside")
    item.rename(aside)
    other.rename(item)
    aside.rename(other)
    return other


def mutate_json(item: Path, chance: random.Random) -> None:
    text = item.read_text()
    lines = text.splitlines() if item.suffix == ".jsonl" else [text]
    at = chance.randrange(len(lines))
    tree = json.loads(lines[at])
    node = tree
    while isinstance(node, dict | list) and node:
        key = chance.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], dict | list) or not node[key] or chance.random() < 0.2:
            if isinstance(node, dict) and chance.random() < 0.3:
                value = node.pop(key)
                if chance.random() < 0.5:
                    node[f"{key}_"] = value
            else:
                node[key] = chance.choice(VALUES)
            break
        node = node[key]
    lines[at] = json.dumps(tree)
    item.write_text("\n".join(lines) + "\n" * text.endswith("\n"))


DAMAGES = [delete, truncate, flip_bits, overwrite, replace, rename, swap, mutate_json, mutate_json]


class Case(NamedTuple):
    kind: str
    damages: list[tuple[str, Path]]

    def touches(self, *parts: str) -> bool:
        return any(path.parts[0] in parts for _, path in self.damages)


def wrong(case: Case, base: Base, run: Path, folder: Path, done: Result) -> str:
    """What is wrong with the outcome of a command that ran, "" where nothing is."""
    if case.kind == "summary" and case.touches("eval", "checkpoints", "config.json"):
        return ""  # a table of scores and checkpoints is one of those that are there
    if case.kind == "train":
        *arrays, lines = outcome("train", run, folder, done)
        *expected, logged = base.trained
        if arrays != expected:
            return "it has trained other weights"
        if case.touches("metrics.jsonl"):  # a line that reads well cannot be known to be another one
            lines, logged = lines[-1:], logged[-1:]
        return "" if lines == logged else f"it has logged {lines}"
    found = outcome(case.kind, run, folder, done)
    there = [step for step in (4, 2) if (run / "checkpoints" / str(step)).is_dir()]
    if not there:
        return "it has run without a checkpoint"
    expected = base.expected(case.kind, there[0])
    if case.kind == "export" and case.touches("eval"):  # the card has the scores that are there
        found, expected = ({k: v for k, v in made.items() if k != "README.md"} for made in (found, expected))
    if found == expected:
        return ""
    return f"it has made something else: {str(found)[:300]}"


@fuzz_cases(600, short=6)
def test_a_damaged_run_is_refused_or_is_as_good_as_whole(base, tmp_path, tally, seeds):
    def cases():
        for seed in seeds:
            chance = random.Random(seed)
            folder = tmp_path / str(seed)
            run = tiny_run.copy(base.run, folder / "run")
            case = Case(chance.choice(KINDS), damage(run, chance))
            done = base.command(case.kind, run, folder)
            kind, text = done.kind, f"seed {seed}: {case.damages} {done}"
            if kind == "ran" and (why := wrong(case, base, run, folder, done)):
                kind, text = "fault", f"{text}\n{why}"
            elif kind != "fault" and (
                left := [file.name for file in folder.rglob("*") if "orbax-checkpoint-tmp" in file.name]
            ):
                kind, text = "fault", f"{text}\nit leaves {left}"
            shutil.rmtree(folder)
            yield kind, text

    tally(cases())
