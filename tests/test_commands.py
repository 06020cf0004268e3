"""The command line, export and generation, on a run that is trained once for the whole session."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers

import jax_it
from jax_it.cli import main, overrides
from jax_it.errors import UserError
from jax_it.run_dir import RunDir
from tests.tiny_run import STEPS, fails, finished, succeeds, write_rows


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return finished(tmp_path_factory)


@pytest.mark.parametrize("command", ["train", "eval", "generate", "export", "preview"])
def test_every_command_explains_itself(capsys, command):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0 and f"jax-it {command}" in capsys.readouterr().out


def test_importing_the_package_does_not_import_jax():
    code = "import sys, jax_it, jax_it.cli; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def test_settings_are_overridden_in_one_word_or_two():
    assert overrides(["--config.train.seed=1", "--config.model.path", "x"], True) == {
        "train.seed": "1",
        "model.path": "x",
    }
    for words, takes_config in ((["--workdri=x"], True), (["--config.train.seed=1"], False), (["--config.a"], True)):
        with pytest.raises(UserError):
            overrides(words, takes_config)


def test_an_export_is_the_checkpoint_and_transformers_reads_it(capfd, run, tmp_path):
    folder = tmp_path / "out"
    assert f"step {STEPS} is in {folder}" in succeeds(capfd, "export", "--workdir", run, "--output", folder)
    assert transformers.AutoConfig.from_pretrained(folder).vocab_size == 120
    model, params, tokenizer = jax_it.load(str(folder))
    _, trained, _ = jax_it.load(str(run))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), params, trained)
    text = "say red 3"
    assert transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"][:-1] == tokenizer.encode([text])[0]
    assert (folder / "model.safetensors").is_file() and model.config.vocab_size == 120
    assert "already exists" in fails(capfd, "export", "--workdir", run, "--output", folder)


def test_an_earlier_checkpoint_can_be_named(capfd, run, tmp_path):
    early = RunDir(run).checkpoints().steps()[0]
    succeeds(capfd, "export", "--workdir", run, "--output", tmp_path / "out", "--checkpoint", early)
    assert "no such checkpoint" in fails(
        capfd, "export", "--workdir", run, "--output", tmp_path / "other", "--checkpoint", 7
    )


def test_rows_come_back_in_their_order_with_predictions(capfd, run, tmp_path):
    rows = [{"prompt": "say red 3", "kept": 1}, {"messages": [{"role": "user", "content": "say a much longer blue 4"}]}]
    rows.append({"prompt": "say teal 5"})
    file, output = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    succeeds(capfd, "generate", "--model", run, "--input", file, "--output", output, "--max-new-tokens", 8)
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "prediction"} for row in found] == rows
    model, params, tokenizer = jax_it.load(str(run))
    prompts = ["say red 3", "say a much longer blue 4", "say teal 5"]
    assert [row["prediction"] for row in found] == jax_it.generate(model, params, tokenizer, prompts, 8)
    alone = succeeds(capfd, "generate", "--model", run, "--prompt", prompts[2], "--max-new-tokens", 8)
    assert alone.strip() == found[2]["prediction"]


def test_a_row_without_a_prompt_is_named(capfd, run, tmp_path):
    file = write_rows(tmp_path / "in.jsonl", [{"prompt": "x"}, {"text": "y"}])
    line = fails(capfd, "generate", "--model", run, "--input", file, "--output", tmp_path / "out.jsonl")
    assert f"{file}, line 2" in line and not (tmp_path / "out.jsonl").exists()
