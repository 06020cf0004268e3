"""A run so small that a test can afford it: its data and config file, and the commands around it."""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from jax_it.cli import main
from tests import xla

STEPS = 60  # of the run; a checkpoint every 15, of which the last two are kept

CONFIG = '''
"""Two sources, one of them under two templates, through a tokenizer that is trained on them."""

from pathlib import Path

from jax_it import config as defaults

HERE = Path(__file__).parent


def get_config(arg=""):
    config = defaults.default()
    config.model.pretrained = False
    config.model.tokenizer = "train"
    config.model.tokenizer_size = 120
    config.model.architecture = {
        "model_type": "t5", "vocab_size": 120, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "dropout_rate": 0.1,
        "decoder_start_token_id": 0,
    }
    config.data.train = [
        {"path": str(HERE / "say.jsonl")},
        {"path": str(HERE / "names.jsonl"), "template": ["Who? {{name}} ||| {{who}}", "{{name}}: ||| {{who}}"]},
    ]
    config.data.eval = [{"path": str(HERE / "test.jsonl")}]
    config.data.max_source_length = 32
    config.data.max_target_length = 16
    config.data.cache_dir = str(HERE / "cache")
    config.train.duration = "60 steps"
    config.train.batch_size = 8
    config.train.log_every = "1 steps"
    config.train.checkpoint_every = "15 steps"
    config.train.optimizer.learning_rate = 3e-2
    config.train.optimizer.warmup = "3%"
    config.eval.metrics = ["rougeL", "exact_match"]
    config.eval.batch_size = 4
    if arg == "causal":
        config.model.architecture = {
            "model_type": "llama", "vocab_size": 120, "hidden_size": 16, "head_dim": 8, "intermediate_size": 16,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        }
        config.data.max_source_length = defaults.default().data.max_source_length
        config.data.max_target_length = defaults.default().data.max_target_length
        config.eval.max_new_tokens = 16
        config.data.max_seq_length = 48
    return config
'''


def write_recipe(folder: Path) -> Path:
    """The config file, with its data beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["red", "green", "blue", "pink", "grey", "teal"]
    say = [{"prompt": f"say {words[i % 6]} {i}", "completion": " ".join(words[i % 6 : i % 6 + 2])} for i in range(36)]
    names = [{"name": f"name {i}", "who": f"number {i % 3}"} for i in range(12)]
    test = [
        {
            "id": f"t{i}",
            "task": ("first", "last")[i > 3],
            "prompt": f"say {words[i % 6]} {i + 36}",
            "completion": [" ".join(words[i % 6 : i % 6 + 2]), words[i % 6]],
        }
        for i in range(7)
    ]
    for name, rows in {"say": say, "names": names, "test": test}.items():
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "config.py").write_text(CONFIG)
    return folder / "config.py"


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def finished(factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, trained once in a test session; its config file is beside it. To be copied."""
    folder = factory.getbasetemp() / "tiny"
    if not (folder / "run").exists():
        config = write_recipe(folder)
        done = start("train", "--config", config, "--workdir", folder / "part").communicate()[0]
        assert (folder / "part" / "checkpoints" / str(STEPS)).is_dir(), done
        (folder / "part").rename(folder / "run")
    return folder / "run"


def copy(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


def start(*arguments: Any, devices: int = 1, limit: int = 0, **faults: Sequence[Any]) -> subprocess.Popen[str]:
    """The command in a process of its own, standard error with its output; no file may grow over `limit` bytes.

    `faults` are those of faults/driver.py.
    """
    code = "from jax_it.cli import main; main()"
    if limit:
        code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); {code}"
    environment = os.environ | {
        "XLA_FLAGS": xla.flags(devices),
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "JAX_COMPILATION_CACHE_DIR": _compiled(),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-c", code, *map(str, arguments)]
    if faults:
        command[1:3] = [str(Path(__file__).with_name("faults") / "driver.py"), json.dumps(faults)]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@cache
def _compiled() -> str:
    """A folder for what all processes of a test session compile once."""
    folder = tempfile.mkdtemp(prefix="jax-it-compiled-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def losses(run: Path) -> list[dict[str, float]]:
    """What metrics.jsonl says of each step, but for what the clock has measured."""
    timed = {
        "tokens_per_second", "examples_per_second", "seconds_per_step", "flops_per_second", "data_share", "goodput",
        "host_memory",
    }  # fmt: skip
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]


def fails(capfd: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The one line on standard error with which the command fails, with exit code 2 and nothing else said."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    assert exit.value.code == 2, err
    assert out == "" and err.endswith("\n") and err.count("\n") == 1, err
    return err.rstrip()


def succeeds(capfd: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """What the command prints."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    assert exit.value.code == 0, err
    return out
