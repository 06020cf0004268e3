"""Seconds from a command's start to what it is for: imports, `--help`, and the first training step, cold and warm.

    python bench/startup.py --config quickstart [--config.x.y=v …] [--rounds 3]

Every measurement is a new process. `cold`: with an empty cache directory, `warm`: with what the run before it left
there (compiled programs, tokenized data). The peers' imports are those of a script with Seq2SeqTrainer or
SFTTrainer, where they are installed. The limit is an interpreter that does nothing.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from measure import alternate, machine, ratio, timed


def start(command: Sequence[str]) -> None:
    """Run a command with this Python. Raises CalledProcessError, with what it said, if it fails."""
    subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True)


def train(options: Sequence[str], cache: str) -> None:
    """Take one training step in a new run."""
    with tempfile.TemporaryDirectory() as folder:
        run = ["-m", "jax_it", "train", "--workdir", str(Path(folder) / "run"), f"--config.data.cache_dir={cache}"]
        start([*run, "--config.train.duration=1 steps", *options])


def first_step(options: Sequence[str], warm: str) -> None:
    """Take a training step with an empty cache directory, or with `warm`."""
    if warm:
        train(options, warm)
    else:
        with tempfile.TemporaryDirectory() as cache:
            train(options, cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--rounds", type=int, default=3)
    options, rest = parser.parse_known_args()
    print(machine(), flush=True)
    commands = {
        "an interpreter": ["-c", "pass"],
        "import jax_it": ["-c", "import jax_it"],
        "jax-it --help": ["-m", "jax_it", "--help"],
        "jax-it train --help": ["-m", "jax_it", "train", "--help"],
    }
    if find_spec("torch"):
        commands["from transformers import Seq2SeqTrainer"] = ["-c", "from transformers import Seq2SeqTrainer"]
    if find_spec("trl"):
        commands["from trl import SFTTrainer"] = ["-c", "from trl import SFTTrainer"]
    sides = {name: partial(timed, partial(start, command)) for name, command in commands.items()}
    alternate(1, sides)  # writes bytecode, and brings files into memory
    for name, found in alternate(options.rounds, sides).items():
        best = min(found)
        print(f"{name}: {best.wall:.2f} s, {min(x.processor for x in found):.2f} processor seconds", flush=True)
    with tempfile.TemporaryDirectory() as cache:
        arguments = [f"--config={options.config}", *rest]
        train(arguments, cache)
        steps = {
            name: partial(timed, partial(first_step, arguments, kept)) for name, kept in (("warm", cache), ("cold", ""))
        }
        seconds = alternate(options.rounds, steps)
    for name, found in seconds.items():
        best, processor = min(found).wall, min(x.processor for x in found)
        print(f"first step and checkpoint, {name}: {best:.1f} s, {processor:.1f} processor seconds")
    print(f"cold takes {ratio(seconds['warm'], seconds['cold'])} of warm's time")


if __name__ == "__main__":
    main()
